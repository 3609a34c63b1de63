"""Words that say nothing of a document's subject, for each language; a clusterer leaves them out.

Short lists of the commonest function words, lower case, written for this project. In scripts that put no spaces
between words (zh, ja, th) the entries are the character pairs that such words make, as `features` cuts them.
Source of the idea: METHODS §2.3 (the published pipeline joins the lists of its languages).
"""

from __future__ import annotations

STOP_WORDS: dict[str, str] = {
    "ar": "في من على إلى عن أن ان هذا هذه ذلك تلك التي الذي الذين ما لا لم لن هو هي هم كان كانت يكون مع كل قد ثم أو "
    "او بين بعد قبل عند حتى إذا اذا لكن غير كما أي اي و ف ب ل ك منها فيها عليه به له لها إن ليس حيث منذ عندما",
    "bg": "и в на с за от до да не се е са по при без към но или като че ще това този тази тези той тя те то ние "
    "вие аз ти си ги го му им бе беше са бил била били който която което които как какво кога където ако само "
    "още вече между след преди под над през може има няма",
    "de": "der die das den dem des ein eine einer eines einem einen und oder aber in im an am auf aus bei beim mit "
    "nach von vom zu zum zur für über unter durch gegen ohne um ist sind war waren wird werden wurde wurden "
    "hat haben hatte kann können nicht auch nur noch schon sich sie er es wir ihr ich du als wie wenn dass "
    "daß so sein seine ihre dieser diese dieses man mehr sehr",
    "el": "και το τα η ο οι του της των τον την τις τους σε στο στη στην στον στα στις στους με για από απο που να "
    "θα δεν μη μην είναι ήταν έχει έχουν είχε ως αλλά ή αν όταν όπως πως πώς τι αυτό αυτή αυτός αυτά αυτές "
    "αυτοί ένα μια μία ένας κατά προς παρά μετά πριν μόνο πολύ μας σας μου σου",
    "en": "the of and to in is are was were be been being a an for on at by with from as or not no but if then than "
    "that this these those it its he she they we you his her their our your my which who whom what when where "
    "how can could will would should may might must do does did has have had so such into about over under "
    "between also all any some more most other only there here up out after before",
    "es": "el la los las un una unos unas de del al a en y e o u que no se lo le les su sus es son era eran fue "
    "fueron ser está están con por para sin sobre entre como más pero si ya muy también este esta estos estas "
    "ese esa eso esto aquel hay ha han había puede cuando donde porque desde hasta me te nos mi tu",
    "fa": "و در به از که این آن را با برای است بود شد شود می نمی های ها یک بر تا هم یا اما اگر نیز خود او ما شما من "
    "باید کرد کند شده بودند هستند دارد",
    "fr": "le la les un une des de du au aux à en et ou mais que qui quoi dont où ne pas plus se ce cet cette ces "
    "son sa ses leur leurs il elle ils elles on nous vous je tu est sont était étaient être été avoir ont "
    "avait pour par avec sans sous sur dans entre comme si aussi très tout toute tous toutes peut même "
    "lorsque quand car donc ni",
    "hi": "के का की में है हैं को से पर और ने यह वह ये वे इस उस एक कि जो तो ही भी था थे थी हो होता होती होते कर "
    "करने करता करते किया लिए गया गई गए अपने नहीं या तक साथ बाद जब तब कुछ द्वारा",
    "id": "yang dan di ke dari untuk pada dengan adalah ini itu atau tidak akan dalam oleh sebagai juga dapat bisa "
    "ada jika maka karena saat ketika sudah telah lebih hanya saja agar seperti antara setelah sebelum kita "
    "kami anda saya dia mereka para sebuah suatu tersebut",
    "it": "il lo la i gli le un uno una di del dello della dei degli delle a al allo alla ai agli alle da dal dalla "
    "in nel nella nei nelle con su sul sulla per tra fra e ed o che non si è sono era erano essere ha hanno "
    "aveva come più ma se anche questo questa questi queste quello quella quando dove perché ci ne mi ti vi "
    "loro suo sua può",
    "ja": "ます です した して する ない ある いる こと もの この その ので から まで より には では とは でも への "
    "など られ され れる れば って った いた いて たい なる なり なっ また とい いう うに よう ため とし しま "
    "てい いま せん ませ まし のは のに のが の場",
    "ko": "그 이 저 것 수 및 또는 그리고 그러나 하지만 에서 으로 로 에게 까지 부터 하는 하고 한다 합니다 있는 있다 "
    "있습니다 없는 없다 없습니다 되는 된다 됩니다 대한 위해 위한 때 경우 같은 다른 모든 어떤 더 등 이는 "
    "이것은 때문에 통해 따라 대해 않는 않습니다",
    "pl": "i w we z ze na do o od po za przez przy dla nad pod przed bez się nie jest są był była było były być jak "
    "że to ten ta te tego tej tych tym co który która które których ale lub albo oraz a jeśli gdy czy już "
    "tylko może także tak jego jej ich on ona ono oni my wy ja",
    "pt": "o a os as um uma uns umas de do da dos das em no na nos nas por pelo pela para com sem sob sobre entre e "
    "ou que não se é são era eram foi foram ser está estão ao aos à às como mais mas também já muito este "
    "esta estes estas esse essa isso isto ele ela eles elas seu sua seus suas há pode quando onde porque até "
    "você nós eu",
    "ru": "и в во не на я он она оно они мы вы ты с со к ко у о об от до из за по для при без под над через между "
    "что как так это этот эта эти то тот та те но или а же ли бы если когда где который которая которое "
    "которые его её ее их был была было были быть есть может только уже ещё еще также все всё после перед",
    "sv": "och i att det som en ett den de på är av för med till inte om har var hade kan ska skulle men eller så "
    "från vid när där hur vad vi ni jag du han hon man sig sin sitt sina också bara mycket efter under över "
    "mellan",
    "sw": "na ya wa kwa ni katika la za cha vya kuwa hii hiyo huu hilo hayo haya hizi hizo hao yake wake lake zake "
    "yao wao yeye sisi mimi wewe lakini au kama pia tu sana bila baada kabla kila hata ambayo ambao ambaye "
    "alikuwa ilikuwa si hakuna kwamba ili juu chini",
    "th": "ใน ได ให มี ไม ก็ จะ กา าร ขอ อง",
    "tr": "ve bir bu şu o da de ki ile için gibi kadar daha çok en ne mi mı mu mü ya veya ama fakat ancak değil var "
    "yok olan olarak olduğu olur oldu ise her hiç sonra önce göre kendi ben sen biz siz onlar bunu şey eğer "
    "tüm bazı diye",
    "uk": "і й та в у на не що як з із зі до за по для при без під над через між про від це цей ця ці той та те ті "
    "але або чи якщо коли де який яка яке які його її їх він вона воно вони ми ви ти я був була було були "
    "бути є може лише тільки також вже ще всі все після перед",
    "ur": "کے کا کی میں ہے ہیں کو سے پر اور نے یہ وہ اس ان ایک کہ جو تو ہی بھی تھا تھے تھی ہو ہوتا ہوتی کر کرنے "
    "کرتا کیا لیے گیا گئی گئے اپنے نہیں یا تک ساتھ بعد جب کچھ",
    "vi": "và của là có cho các những một được trong với không này đó khi từ để ra vào về tại theo như cũng đã đang "
    "sẽ bị do thì mà nếu hay hoặc nhưng rất nhiều trên dưới sau trước giữa người tôi bạn họ chúng ta",
    "zh": "我们 你们 他们 它们 这个 那个 这些 那些 一个 一些 可以 没有 不是 就是 还是 但是 因为 所以 如果 或者 以及 "
    "并且 对于 关于 其中 其他 所有 任何 什么 怎么 如何 这样 那样 时候 之后 之前 的一 是一 了一 的是 也是 都是 "
    "的时 不能 不会 还有 只有 已经 由于 从而 为了 此外 並且 這個 這些 我們 沒有 因為 時候",
}


def stop_words(languages: tuple[str, ...] = ()) -> frozenset[str]:
    """The words of these languages; of all, without an argument."""
    return frozenset(word for code in languages or tuple(STOP_WORDS) for word in STOP_WORDS[code].split())
