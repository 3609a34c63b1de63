"""What tokenising does under faults: the bytes of an undisturbed run, or one refusal; anything else fails this script.

    python benchmarks/tokenizing_faults.py VOCABULARY [--kills 20]

Kills come at moments drawn uniformly over the undisturbed run's time, to the tokenising process alone (its workers must
end by themselves); after each, the same command is run again and all files are compared. The other rows damage the
text, the disk or the token files. The text is ../shared/data/pydocs/valid, and train for the kills.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "data" / "pydocs"
HUGE_BYTES = 100_000_000
DRIVER = """
import sys
from pathlib import Path
from xlmega.data import tokenizing
from xlmega.errors import run_main
tokenizing.JOURNAL_SECONDS = 0.2
run_main(lambda: tokenizing.tokenize_corpus(*map(Path, sys.argv[1:4]), workers=int(sys.argv[4]), only=True) and None)
"""


def command(split: Path, vocabulary: Path, output: Path, workers: int) -> list[str]:
    return [sys.executable, "-c", DRIVER, str(split), str(vocabulary), str(output), str(workers)]


def run(split: Path, vocabulary: Path, output: Path, workers: int = 2, **settings: object) -> str:
    """'' when it went well, else the one message; a trace or another exit code fails the script."""
    given = command(split, vocabulary, output, workers)
    done = subprocess.run(given, capture_output=True, text=True, env=environment(), **settings)  # type: ignore[call-overload]
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        sys.exit(f"not one clear refusal: exit code {done.returncode}\n{done.stderr}")
    return str(done.stderr.strip())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def row(fault: str, outcome: str) -> None:
    print(f"| {fault} | {' '.join(outcome.split())[:150]} |", flush=True)


def kills(vocabulary: Path, folder: Path, count: int, seed: int) -> None:
    split = TEXT / "train"
    begun = time.monotonic()
    assert not run(split, vocabulary, folder / "whole")
    took, whole = time.monotonic() - begun, contents(folder / "whole")
    generator, places = random.Random(seed), {"before": 0, "inside": 0, "after": 0}
    for k in range(count):
        output = folder / f"killed{k}"
        process = subprocess.Popen(command(split, vocabulary, output, 2), stderr=subprocess.DEVNULL, env=environment())
        time.sleep(generator.uniform(0, took))
        process.send_signal(signal.SIGKILL)
        process.wait()
        place = "after" if (output / "train").exists() else "inside" if (output / "train.part").exists() else "before"
        places[place] += 1
        told = run(split, vocabulary, output)
        if told and place != "after":
            sys.exit(f"kill {k}: the second run was refused: {told}")
        if contents(output) != whole:
            sys.exit(f"kill {k}: other bytes than the undisturbed run")
        shutil.rmtree(output)
    row(
        f"SIGKILL at {count} random moments of {took:.1f} s ({places})", "the same bytes after running again, each time"
    )


def damaged_text(vocabulary: Path, folder: Path) -> None:
    source = TEXT / "valid" / "fr" / "00000.jsonl.gz"
    packed, text = source.read_bytes(), gzip.decompress(source.read_bytes())
    middle = text.index(b"\n", len(text) // 2) + 1
    at = len(packed) // 2
    faults: dict[str, tuple[str, bytes]] = {
        "gzip cut off": ("a.jsonl.gz", packed[:-1000]),
        "a bit of the gzip flipped": ("a.jsonl.gz", packed[:at] + bytes([packed[at] ^ 4]) + packed[at + 1 :]),
        "gzip's checksum flipped": ("a.jsonl.gz", packed[:-6] + bytes([packed[-6] ^ 4]) + packed[-5:]),
        "plain text called .gz": ("a.jsonl.gz", text),
        "a line cut off": ("a.jsonl", text[: middle + 100]),
        "invalid UTF-8": ("a.jsonl", text[:middle] + b'{"text": "caf\xe9"}\n' + text[middle:]),
        "half of a surrogate pair": ("a.jsonl", text[:middle] + b'{"text": "x\\ud83d"}\n'),
        "another lang than the folder's": ("a.jsonl", b'{"text": "x", "lang": "de"}\n'),
        "lang that is a path": ("a.jsonl", b'{"text": "x", "lang": "../../x"}\n'),
        "text that is a number": ("a.jsonl", b'{"text": 3}\n'),
        "no text": ("a.jsonl", b'{"id": "3"}\n'),
        "nesting of 100,000": ("a.jsonl", b"[" * 100_000 + b"\n"),
        "only blank lines": ("a.jsonl", b"\n \n"),
        "empty file": ("a.jsonl", b""),
    }
    for k, (fault, (name, content)) in enumerate(faults.items()):
        split, output = folder / f"text{k}" / "fr" / name, folder / f"out{k}"
        split.parent.mkdir(parents=True)
        split.write_bytes(content)
        told = run(split.parent.parent, vocabulary, output)
        if not told or (output / split.parent.parent.name).exists():
            sys.exit(f"{fault}: not refused")
        row(fault, "refused: " + told.replace(str(folder), ""))


def odd_text(vocabulary: Path, folder: Path) -> None:
    from xlmega.data.indexed import open_corpus, verify
    from xlmega.text.vocabulary import load_vocabulary

    vocab = load_vocabulary(vocabulary)
    line = "NUL \0, a tab\t, U+2581 \u2581, <D> and <0x0A>, \U0001f680. "
    texts = ["", "\0", line, (line * (HUGE_BYTES // len(line.encode()) + 1)), "", "x"]
    split = folder / "odd" / "fr" / "a.jsonl"
    split.parent.mkdir(parents=True)
    split.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    told = run(split.parent.parent, vocabulary, folder / "odd_tokens")
    tokens = open_corpus(folder / "odd_tokens", "odd")["fr"]
    verify(tokens.path)
    for k, text in enumerate(texts):
        if vocab.decode(tokens.document(k)[:-1].tolist()) != text or tokens.document(k)[-1] != vocab.eod_id:
            sys.exit(f"document {k} did not come back")
    size = len(texts[3].encode()) / 1e6
    row(
        f"empty documents, NUL, names of specials, a document of {size:.0f} MB",
        told or "all come back, letter by letter",
    )


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """A tmpfs, where this may mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(vocabulary: Path, folder: Path) -> None:
    import resource

    assert not run(TEXT / "valid", vocabulary, folder / "valid")
    whole = contents(folder / "valid")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    told = run(TEXT / "valid", vocabulary, folder / "limited", preexec_fn=limit)
    if not told or (folder / "limited" / "valid").exists():
        sys.exit("a full disk was not refused")
    row("files limited to 0.5 MB (RLIMIT_FSIZE)", "refused: " + told.replace(str(folder), ""))
    assert not run(TEXT / "valid", vocabulary, folder / "limited")
    row(
        "the same command with room",
        "the same bytes" if contents(folder / "limited") == whole else sys.exit("other bytes"),
    )
    with small_disk(folder / "disk", 2) as disk:
        if disk is None:
            row("a disk of 2 MB (tmpfs)", "not tried: no permission to mount one here")
            return
        told = run(TEXT / "valid", vocabulary, disk / "t")
        if not told or (disk / "t" / "valid").exists():
            sys.exit("a full disk was not refused")
        row("a disk of 2 MB (tmpfs)", "refused: " + told.replace(str(folder), ""))


def damaged_tokens(vocabulary: Path, folder: Path, seed: int) -> None:
    from xlmega.data.indexed import open_corpus, verify
    from xlmega.errors import DataError

    def caught(root: Path) -> str:
        try:
            for tokens in open_corpus(root, "valid").values():
                verify(tokens.path)
        except DataError as error:
            return str(error)
        return ""

    generator, root = random.Random(seed), folder / "valid"
    count: dict[str, int] = {}
    for suffix in ("bin", "idx", "json"):
        file = root / "valid" / f"fr.{suffix}"
        content = file.read_bytes()
        for _ in range(200):
            at = generator.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
            count[suffix] = count.get(suffix, 0) + bool(caught(root))
        file.write_bytes(content)
    row("200 single bits flipped in each of .bin, .idx and .json", f"found: {count}")
    # A bit of white space in the JSON may mean the same; any other must be found.
    if count["bin"] != 200 or count["idx"] != 200:
        sys.exit("a flipped bit was not found")
    whole = {path: path.read_bytes() for path in (root / "valid").glob("*.*")}
    edits: dict[str, Callable[[], object]] = {
        ".bin of another language": lambda: (root / "valid/fr.bin").write_bytes(whole[root / "valid/es.bin"]),
        ".idx of another language": lambda: (root / "valid/fr.idx").write_bytes(whole[root / "valid/es.idx"]),
        "manifest of another language": lambda: (root / "valid/fr.json").write_bytes(whole[root / "valid/es.json"]),
        ".bin cut off": lambda: os.truncate(root / "valid/fr.bin", 1000),
        ".idx cut off": lambda: os.truncate(root / "valid/fr.idx", 1000),
        "manifest cut off": lambda: os.truncate(root / "valid/fr.json", 100),
        ".bin with more at its end": lambda: (root / "valid/fr.bin").write_bytes(whole[root / "valid/fr.bin"] * 2),
        "no .bin": (root / "valid/fr.bin").unlink,
    }
    for fault, edit in edits.items():
        edit()
        told = caught(root)
        if not told:
            sys.exit(f"{fault}: not found")
        row(fault, "refused: " + told.replace(str(folder), ""))
        for path, kept in whole.items():
            path.write_bytes(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not TEXT.is_dir():
        sys.exit(f"the text of this benchmark is not here: {TEXT}")
    print("| fault | outcome |\n|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        damaged_text(args.vocabulary, folder)
        full_disk(args.vocabulary, folder)
        damaged_tokens(args.vocabulary, folder, args.seed)
        odd_text(args.vocabulary, folder)
        kills(args.vocabulary, folder, args.kills, args.seed)


if __name__ == "__main__":
    main()
