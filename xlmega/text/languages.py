"""Language codes of two letters (ISO 639-1) and of three (ISO 639-3), either way.

The codes of a corpus are the user's own; other tools want theirs (OPUS and language identification two letters where
there are two, FLORES three and a script), so this says which name the same language. A member stands for its
macro-language where tools have only that: swh for sw, ekk for et, arb for ar, cmn for zh, zsm for ms.
"""

from __future__ import annotations

import re

# three letters : two letters
_TABLE = """
aar:aa abk:ab afr:af aka:ak amh:am ara:ar arg:an asm:as ava:av ave:ae aym:ay aze:az bak:ba bam:bm bel:be ben:bn bis:bi
bod:bo bos:bs bre:br bul:bg cat:ca ces:cs cha:ch che:ce chu:cu chv:cv cor:kw cos:co cre:cr cym:cy dan:da deu:de div:dv
dzo:dz ell:el eng:en epo:eo est:et eus:eu ewe:ee fao:fo fas:fa fij:fj fin:fi fra:fr fry:fy ful:ff gla:gd gle:ga glg:gl
glv:gv grn:gn guj:gu hat:ht hau:ha hbs:sh heb:he her:hz hin:hi hmo:ho hrv:hr hun:hu hye:hy ibo:ig ido:io iii:ii iku:iu
ile:ie ina:ia ind:id ipk:ik isl:is ita:it jav:jv jpn:ja kal:kl kan:kn kas:ks kat:ka kau:kr kaz:kk khm:km kik:ki kin:rw
kir:ky kom:kv kon:kg kor:ko kua:kj kur:ku lao:lo lat:la lav:lv lim:li lin:ln lit:lt ltz:lb lub:lu lug:lg mah:mh mal:ml
mar:mr mkd:mk mlg:mg mlt:mt mon:mn mri:mi msa:ms mya:my nau:na nav:nv nbl:nr nde:nd ndo:ng nep:ne nld:nl nno:nn nob:nb
nor:no nya:ny oci:oc oji:oj ori:or orm:om oss:os pan:pa pli:pi pol:pl por:pt pus:ps que:qu roh:rm ron:ro run:rn rus:ru
sag:sg san:sa sin:si slk:sk slv:sl sme:se smo:sm sna:sn snd:sd som:so sot:st spa:es sqi:sq srd:sc srp:sr ssw:ss sun:su
swa:sw swe:sv tah:ty tam:ta tat:tt tel:te tgk:tg tgl:tl tha:th tir:ti ton:to tsn:tn tso:ts tuk:tk tur:tr twi:tw uig:ug
ukr:uk urd:ur uzb:uz ven:ve vie:vi vol:vo wln:wa wol:wo xho:xh yid:yi yor:yo zha:za zho:zh zul:zu
"""
_MEMBERS = """
als:sq arb:ar azb:az azj:az ayr:ay cmn:zh ekk:et ydd:yi fil:tl fuv:ff gaz:om gug:gn khk:mn kmr:ku lvs:lv npi:ne ory:or
pbt:ps pes:fa plt:mg prs:fa quy:qu quz:qu swh:sw uzn:uz uzs:uz zsm:ms knc:kr
"""
TWO_LETTERS: dict[str, str] = dict(pair.split(":") for pair in (_TABLE + _MEMBERS).split())
"""three letters -> two letters"""
_THREE: dict[str, list[str]] = {}
for _three, _two in TWO_LETTERS.items():
    _THREE.setdefault(_two, []).append(_three)
RENAMED = {"iw": "he", "in": "id", "ji": "yi", "jw": "jv", "mo": "ro"}


def base(language: str) -> str:
    """The code without script or region: 'zho' of 'zho_Hans'."""
    return re.split("[-_]", language)[0].lower()


def names_of(language: str) -> tuple[str, ...]:
    """Every code under which a tool may know the language, the given one first, two letters before three."""
    code = base(language)
    code = RENAMED.get(code, code)
    two = code if len(code) == 2 else TWO_LETTERS.get(code, "")
    others = [two, *_THREE.get(two, ())] if two else []
    macro = {"nb": ["no", "nor"], "nn": ["no", "nor"]}.get(two, [])
    return tuple(dict.fromkeys([language, code, *others, *macro]))


def two_letters(language: str) -> str:
    """The two-letter code, or the code itself where there is none."""
    code = RENAMED.get(base(language), base(language))
    return next((name for name in names_of(code) if len(name) == 2), code)
