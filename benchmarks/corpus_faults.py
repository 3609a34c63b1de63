"""What corpus building survives: kills, full disks, damaged input, two writers; and its memory.

For each verb of tools/build_corpus.py an undisturbed run gives the bytes that count. Then:
kills   the same command, killed with SIGKILL at a random moment up to three times, is finished by running it again:
        every file must have the bytes of the undisturbed run, side-cars and summary included;
disk    the output on a file system that is too small must end in one message and exit code 2, with nothing under the
        output's name, and with room again in the same bytes;
memory  the peak of each verb on its input and on ten times as much;
damage  each kind of damaged input must end in one message that names it, or (where it is no damage) in the right text;
writers two commands on one output at once: one builds it, the other is refused, and the bytes are those of one.
Text: shared/data beside the repository where it is there, else made languages.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TOOL = [sys.executable, str(ROOT / "tools" / "build_corpus.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each verb (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a new one that is removed)")
    args = parser.parse_args()
    work = args.folder or Path(tempfile.mkdtemp(prefix="corpus_faults."))
    work.mkdir(parents=True, exist_ok=True)
    failures = 0
    try:
        verbs = prepare(work)
        print("| verb | undisturbed | killed | moments hit | same bytes |\n|---|---|---|---|---|")
        for verb, words in verbs.items():
            failures += kills(work, verb, words, args.kills, random.Random(f"{args.seed} {verb}"))
        print("\n| verb | full disk | refused in one message | same bytes with room |\n|---|---|---|---|")
        for verb, words in verbs.items():
            failures += full_disk(work, verb, words)
        print("\n| verb | two writers: built, refused | same bytes |\n|---|---|---|")
        for verb, words in verbs.items():
            failures += two_writers(work, verb, words)
        print("\n| verb | peak memory, MB | on ten times the text |\n|---|---|---|")
        for verb in verbs:
            print(f"| {verb} | {peak(work, 1, verb):.0f} | {peak(work, 10, verb):.0f} |", flush=True)
        print("\n| damage | verb | outcome |\n|---|---|---|")
        failures += damages(work)
    finally:
        if not args.folder:
            shutil.rmtree(work)
    print(f"\n{failures} failures")
    sys.exit(failures > 0)


def prepare(work: Path) -> dict[str, list[str]]:
    """The inputs made, and each verb's words without its output."""
    texts, first, second = work / "texts", work / "lines.en", work / "lines.fr"
    if DATA.is_dir():
        for split in ("train", "valid"):
            for code in ("it", "tr"):
                (texts / split / code).mkdir(parents=True, exist_ok=True)
                shutil.copy2(DATA / "pydocs" / split / code / "00000.jsonl.gz", texts / split / code)
        source = DATA / "parallel" / "en-fr.train.jsonl.gz"
    else:
        run("made", "--megabytes", "1", "--languages", "qla", "qlb", "--output", str(work / "made"))
        for split in ("train", "valid"):
            shutil.copytree(work / "made" / split, texts / split, dirs_exist_ok=True)
        source = work / "made" / "parallel" / "qla-qlb.train.jsonl.gz"
    records = work / "pairs" / f"{source.name.split('.')[0]}.jsonl"
    records.parent.mkdir(exist_ok=True)
    with gzip.open(source, "rt", encoding="utf-8") as stream, records.open("w") as kept:
        with first.open("w") as one, second.open("w") as other:
            for line in islice(stream, 1000):
                sides = [" ".join(side.split()) for side in json.loads(line)["translation"].values()]
                one.write(sides[0] + "\n")
                other.write(sides[1] + "\n")
                kept.write(line)
    return prepare_words(work)


def prepare_words(work: Path) -> dict[str, list[str]]:
    """Each verb's words without its output."""
    texts, first, second = work / "texts", work / "lines.en", work / "lines.fr"
    codes = sorted(path.name for path in (texts / "train").iterdir())
    records = work / "pairs" / f"{'en-fr' if DATA.is_dir() else 'qla-qlb'}.jsonl"
    identify = [] if DATA.is_dir() else ["--skip_language_id"]
    return {
        "text": ["text", str(texts)],
        "mc4": ["mc4", str(texts), "--pieces", "6", "--num_shards", "5", "--compression", "gz"],
        "oscar": ["oscar", str(texts / "train" / "{language}"), "--languages", *codes[:1], "--megabytes", "0.3"],
        "europarl": [
            "europarl", "--languages", "en", "fr", "--europarl", str(first), str(second),
            "--multiun", str(first), str(second),
        ],
        "bitext": [
            "bitext", f"{first},{second}", str(records), "--languages", *records.name.split(".")[0].split("-"),
            "--embedding_threshold", "0", "--max_per_corpus", "600", "--valid_pairs", "100", *identify,
        ],
    }  # fmt: skip


def run(*words: str, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *words], capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def undisturbed(work: Path, verb: str, words: list[str]) -> tuple[dict[str, bytes], float]:
    output = work / "undisturbed" / verb
    begun = time.monotonic()
    if not output.exists():
        done = run(*words, "--output", str(output))
        assert done.returncode == 0, done.stderr
    return contents(output), time.monotonic() - begun


def clean(stderr: str) -> bool:
    """One message of ours and nothing else."""
    return stderr.startswith(("DataError: ", "ConfigError: ")) and "Traceback" not in stderr


def kills(work: Path, verb: str, words: list[str], number: int, draw: random.Random) -> int:
    expected, seconds = undisturbed(work, verb, words)
    output = work / "killed" / verb
    same, hits, moments = 0, 0, []
    for _ in range(number):
        shutil.rmtree(output.parent, ignore_errors=True)
        for _ in range(draw.randint(1, 3)):
            process = subprocess.Popen(
                [*TOOL, *words, "--output", str(output)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
            )
            moment = draw.uniform(0.05, 1.0) * seconds
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                hits += 1
                moments.append(moment)
        done = run(*words, "--output", str(output))
        same += done.returncode == 0 and contents(output) == expected
        assert not list(output.parent.glob(f"{output.name}.part"))
    span = f"{min(moments):.1f} to {max(moments):.1f} s" if moments else "none"
    print(
        f"| {verb} | {seconds:.1f} s, {len(expected)} files | {number} times, {hits} kills | {span} | {same} |",
        flush=True,
    )
    return number - same


def full_disk(work: Path, verb: str, words: list[str]) -> int:
    expected, _ = undisturbed(work, verb, words)
    disk = work / "disk"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    size = sum(map(len, expected.values()))
    mounted = mount(disk, size * 6 // 10)
    how = f"tmpfs of {size * 6 // 10 // 1024} kB" if mounted else "RLIMIT_FSIZE"
    limit = None if mounted else (lambda: cap_files(max(map(len, expected.values())) // 2))
    try:
        refused = run(*words, "--output", str(disk / "out"), limit=limit)
        good = refused.returncode == 2 and clean(refused.stderr) and not (disk / "out").exists()
        told = refused.stderr.strip().splitlines()[0] if refused.stderr else "nothing"
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        again = run(*words, "--output", str(disk / "out"))
        same = again.returncode == 0 and contents(disk / "out") == expected
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    why = told.rpartition("': ")[2].split(". ")[0]
    print(f"| {verb} | {how} | {'yes' if good else 'NO: ' + told}: {why} | {'yes' if same else 'NO'} |", flush=True)
    return (not good) + (not same)


def mount(folder: Path, size: int) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(line, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def cap_files(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def two_writers(work: Path, verb: str, words: list[str]) -> int:
    expected, _ = undisturbed(work, verb, words)
    output = work / "writers" / verb
    line = [*TOOL, *words, "--output", str(output)]
    processes = [
        subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    told = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    # The second may also come when the first has finished, and then finds all of it made.
    good = codes == [0, 0] or (codes == [0, 2] and any("is being written" in text and clean(text) for text in told))
    same = contents(output) == expected
    print(f"| {verb} | {codes.count(0)}, {codes.count(2)} | {'yes' if same and good else 'NO'} |", flush=True)
    return not (good and same)


def peak(work: Path, times: int, verb: str) -> float:
    """MB of resident memory at most, on the inputs repeated so many times."""
    folder = work / f"times{times}"
    if not folder.exists():
        prepare(folder)
        for file in [*(folder / "texts").rglob("*.gz"), *folder.glob("lines.*")]:
            body = file.read_bytes()
            with file.open("wb") as stream:
                for _ in range(times):
                    stream.write(body)
    words = prepare_words(folder)[verb]
    if verb == "oscar":
        words[words.index("--megabytes") + 1] = str(0.3 * times)
    if verb == "bitext":
        words[words.index("--max_per_corpus") + 1] = str(1000 * times)
        words.append("--skip_language_id")
    process = subprocess.Popen(
        [*TOOL, *words, "--output", str(folder / "out" / verb)], stdout=subprocess.DEVNULL, env=ENVIRONMENT
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return usage.ru_maxrss / 1024


def damages(work: Path) -> int:
    """Each kind of damage to an input of each reader."""
    record = json.dumps({"text": "un deux trois", "lang": "fr", "id": "1"}).encode() + b"\n"
    packed = gzip.compress(record * 1000)
    big = json.dumps({"text": "é" * (50 << 20)}).encode() + b"\n"
    cases: list[tuple[str, str, bytes, str | None]] = [
        # what, file name, content, part of the message or None where it is good text
        ("invalid UTF-8", "a.jsonl", record + b'{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8"),
        ("invalid UTF-8", "a.txt", b"good\ncaf\xe9\n", "a.txt:2: not UTF-8"),
        ("lone surrogate", "a.jsonl", record + b'{"text": "\\ud83d"}\n', "half of a surrogate pair"),
        ("lone surrogate in the id", "a.jsonl", b'{"text": "x", "id": "\\udc00"}\n', "half of a surrogate pair"),
        ("NUL in JSON is text", "a.jsonl", b'{"text": "a\\u0000b"}\n', None),
        ("NUL in plain text", "a.txt", "mot\n".encode("utf-16-le"), "a.txt:1: a NUL byte"),
        ("empty file", "a.jsonl", b"", "holds no document"),
        ("only blank documents", "a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n', "holds no document"),
        ("100 MB document", "a.jsonl", big, None),
        ("wrong lang", "a.jsonl", record + b'{"text": "x", "lang": "de"}\n', "lang 'de'"),
        ("lang that is a path", "a.jsonl", b'{"text": "x", "lang": "../../x"}\n', "lang '../../x'"),
        ("interrupted gz", "a.jsonl.gz", packed[: len(packed) // 2], "damaged or cut off here"),
        ("overwritten gz", "a.jsonl.gz", packed[:40] + bytes(20) + packed[60:], "damaged or cut off here"),
        ("no gz at all", "a.jsonl.gz", record, "damaged or cut off here"),
        ("interrupted line", "a.jsonl", record + b'{"text": "un de', "a.jsonl:2: not JSON"),
        ("number of 5,000 digits", "a.jsonl", b'{"text": "x", "id": ' + b"1" * 5000 + b"}\n", "not JSON"),
        ("deep nesting", "a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: not JSON"),
        ("an array of documents", "a.json", b'[{"text": "x"}]\n', "a list where an object"),
        ("no text", "a.jsonl", b'{"content": "x"}\n', "text"),
    ]
    failures = 0
    for what, name, content, message in cases:
        for verb in ("text", "mc4", "oscar"):
            if verb == "mc4" and name.endswith(".txt"):
                continue
            folder = work / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            file = folder / "in" / "train" / "fr" / name
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
            words = [verb, str(folder / "in"), "--output", str(folder / "out")]
            if verb == "oscar":
                words += ["--languages", "fr", "--megabytes", "0.0000001", "--valid_percent", "0"]
            done = run(*words)
            if message is None or (verb == "oscar" and done.returncode == 0):
                # The first bytes of training text may end before the damage.
                good = done.returncode == 0 and (message is not None or text_is_whole(folder / "out", content))
                outcome = "the right text" if message is None else "not reached"
            else:
                wanted = {"holds no document": ("holds no document", "there are 0.000 MB", "corpus.json")}
                asked = wanted.get(message, (message,))
                good = done.returncode == 2 and clean(done.stderr) and any(part in done.stderr for part in asked)
                if verb == "mc4" and (what == "only blank documents" or what == "lone surrogate in the id"):
                    good = done.returncode == 0  # this layout keeps blank documents and gives ids of its own
                outcome = done.stderr.strip().splitlines()[0].replace(str(folder), "")[:110] if done.stderr else "kept"
            if not good:
                failures += 1
                outcome = f"FAILED ({done.returncode}) {done.stderr[-200:]}"
            print(f"| {what} | {verb} | {outcome} |", flush=True)
    return failures


def text_is_whole(output: Path, content: bytes) -> bool:
    files = [path for path in (output / "train").rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz"))]
    opened = [gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body for body in (f.read_bytes() for f in files)]
    written = [json.loads(line)["text"] for body in opened for line in body.splitlines()]
    return written == [json.loads(line)["text"] for line in content.split(b"\n") if line]


if __name__ == "__main__":
    main()
