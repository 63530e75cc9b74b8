"""Tokenising tasks once a machine: to token ids in memory, or in memory-mapped Arrow files.

    <cache>/<hash>/   manifest.json  rejects.jsonl  00000.train.arrow  00000.validation.arrow  ...

The hash covers everything the ids depend on: task settings, source files, reader code, tokenizer,
how the family closes and cuts texts, lengths. A folder is filled under another name, task by task,
and renamed when complete; an interrupted build resumes with the missing tasks. One process of a
machine builds while the others wait for its lock, so ranks need no collective, and a killed build
blocks no other process.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from mhr_scale.backbone.tokenizer import hash_tokenizer
from mhr_scale.config import BatchConfig
from mhr_scale.errors import DataError
from mhr_scale.families.family import Family
from mhr_scale.families.packed import EncodedRow
from mhr_scale.rows.chat import ChatTemplate
from mhr_scale.rows.encode import SIDES, TEXT, Cuts, Encoder, Gaps, check_rows_left
from mhr_scale.rows.machine_folder import machine_folder
from mhr_scale.run.files import hash_file, hash_parts, named, write_json
from mhr_scale.run.runlog import Progress, log, rank, ranks_here
from mhr_scale.tasks.suite import Suite
from mhr_scale.tasks.suites import open_suite, source_files
from mhr_scale.tasks.task import Chat, Task

FORMAT = 3
BATCH_ROWS = 8192
HASHED_WHOLE = 32 * 2**20
FOLDS = ("train", "validation")


class TaskTokens:
    """The token ids of one fold of one task; a row is a view into its (mapped) memory."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = list(batches)
        self._views: dict[int, tuple[NDArray[Any], ...]] = {}
        self._size = sum(batch.num_rows for batch in self._batches)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[row] for row in range(self._size))

    def __getitem__(self, index: int) -> EncodedRow:
        number, row = divmod(range(self._size)[index], BATCH_ROWS)
        if number not in self._views:
            inputs, targets = self._batches[number].columns
            columns = (inputs.offsets, inputs.values, targets.offsets, targets.values.offsets)
            arrays = (*columns, targets.values.values)
            self._views[number] = tuple(a.to_numpy(zero_copy_only=True) for a in arrays)
        starts, ids, first, target_starts, target_ids = self._views[number]
        return EncodedRow(
            ids[starts[row] : starts[row + 1]],
            tuple(
                target_ids[target_starts[t] : target_starts[t + 1]]
                for t in range(first[row], first[row + 1])
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCard:
    """What a run needs to know of a task besides its token ids."""

    name: str
    cap: int | None
    weight: float | None
    metric: str
    cuts: Cuts
    n_train: int
    n_validation: int
    mean_input_tokens: float
    mean_target_tokens: float
    digest: str
    first_gaps: tuple[Gaps, ...] = ()
    """What was cut of the first training rows."""
    """A hash of its token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSet:
    """A tokenised suite: a card and the rows of each task, in the order of task numbers."""

    cards: list[TaskCard]
    train: list[TaskTokens]
    validation: list[TaskTokens]
    rejects: list[dict[str, Any]]
    fingerprint: str

    @property
    def inputs(self) -> dict[str, str]:
        """What a run reads of it, by content (`RunFolder.check_inputs`)."""
        return {f"rows of {card.name}": card.digest for card in self.cards}

    @property
    def cuts(self) -> Cuts:
        """Cut and dropped rows of all tasks."""
        return sum((card.cuts for card in self.cards), Cuts())


def open_tokens(
    suite: Suite,
    tokenizer: Any,
    batch: BatchConfig,
    family: Family,
    *,
    cache: str | None = None,
    on_bad: str | None = None,
) -> TokenSet:
    """The tokenised suite: from the cache if it is there, else read, tokenised and cached.

    Without `cache` one rank of a machine tokenises for all, into files that are gone when the
    launch has ended; a single one does in memory, and so does each where files cannot be shared.
    `on_bad` overrides the policy for unusable rows. Raises `DataError` for sources that cannot be
    used and for a damaged cache.
    """
    if suite.chat:  # before a cache is begun
        ChatTemplate(tokenizer, Chat(system=suite.system))
    manifest = describe(suite, tokenizer, batch, family)
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

    def from_cache(cache: Path) -> TokenSet:
        folder = cache / key[:24]
        if not (folder / "manifest.json").is_file():
            suite.check_source()
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache / f".{key[:24]}.lock"):
                if not (folder / "manifest.json").is_file():
                    _build(folder, suite, tokenizer, batch, family, manifest, on_bad)
        return _load(folder, manifest, key)

    if cache is not None:
        return from_cache(Path(cache))
    if ranks_here() > 1:
        try:
            with machine_folder(f"tokens {key} {on_bad}") as folder:
                return from_cache(folder)
        except OSError as error:
            way_out = "set run.token_cache, or TMPDIR to a folder with room"
            log.warning("every rank keeps all tokens: cannot share them (%s); %s", error, way_out)
    reading = open_suite(suite, on_bad=on_bad)
    tokenised = [_tokenise(task, tokenizer, batch, family) for task in reading.tasks]
    reading.intake.check()
    return TokenSet(
        cards=[card for card, _ in tokenised],
        train=[TaskTokens(folds["train"]) for _, folds in tokenised],
        validation=[TaskTokens(folds["validation"]) for _, folds in tokenised],
        rejects=reading.intake.rows(),
        fingerprint=key,
    )


def find_tokens(
    suite: Suite, tokenizer: Any, batch: BatchConfig, family: Family, cache: str
) -> TokenSet | None:
    """The tokenised suite, if it lies in the cache; raises `DataError` as `open_tokens` does."""
    manifest = describe(suite, tokenizer, batch, family)
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    folder = Path(cache) / key[:24]
    return _load(folder, manifest, key) if (folder / "manifest.json").is_file() else None


def describe(suite: Suite, tokenizer: Any, batch: BatchConfig, family: Family) -> dict[str, Any]:
    """Everything the token ids depend on, as JSON values."""
    code = hashlib.sha256()
    tasks = Path(__file__).parents[1] / "tasks"
    readers = [*tasks.rglob("*.py"), *tasks.glob("t0/*.json"), *tasks.glob("crossfit/*.json")]
    encoders = [Path(__file__).with_name(name) for name in ("encode.py", "chat.py")]
    for file in sorted([*readers, *encoders]):
        code.update(file.read_bytes())
    settings: dict[str, Any] = json.loads(json.dumps(asdict(suite)))
    return {
        "format": FORMAT,
        "tasks": settings,
        "sources": [_fingerprint(path) for path in source_files(suite)],
        "code": code.hexdigest(),
        "tokenizer": hash_tokenizer(tokenizer),
        "closing": [family.close([TEXT], side, tokenizer) for side in SIDES],
        "cut": batch.cut or family.cut_side,
        "max_input_tokens": batch.max_input_tokens,
        "max_target_tokens": batch.max_target_tokens,
        "too_long": batch.too_long,
    }


def _fingerprint(path: Path) -> list[Any]:
    """A small file by its hash, a large one by its size and modification time."""
    facts = path.stat()
    if facts.st_size > HASHED_WHOLE:
        return [str(path), facts.st_size, facts.st_mtime_ns]
    return [str(path), facts.st_size, hash_file(path)]


def _tokenise(
    task: Task, tokenizer: Any, batch: BatchConfig, family: Family
) -> tuple[TaskCard, dict[str, list[pa.RecordBatch]]]:
    """One task's card and record batches by fold."""
    encoder = Encoder(task, tokenizer, batch, family)
    rows = {"train": encoder.rows(task.train), "validation": encoder.rows(task.validation)}
    check_rows_left(task, rows["train"], batch)
    kind = _id_type(tokenizer)
    n_train = max(1, len(rows["train"]))
    batches = {fold: list(_batches(rows[fold], kind)) for fold in FOLDS}
    card = TaskCard(
        name=task.name,
        cap=task.cap,
        weight=task.weight,
        metric=task.metric,
        cuts=encoder.cuts,
        n_train=len(rows["train"]),
        n_validation=len(rows["validation"]),
        mean_input_tokens=sum(len(row.input_ids) for row in rows["train"]) / n_train,
        mean_target_tokens=sum(len(row.answers[0]) for row in rows["train"]) / n_train,
        digest=_hash(batches),
        first_gaps=tuple(encoder.first_gaps[: len(rows["train"])]),
    )
    return card, batches


def _hash(folds: Mapping[str, Sequence[pa.RecordBatch]]) -> str:
    """A hash of the token ids of a task's folds."""
    buffers = (
        buffer.to_pybytes()
        for fold in FOLDS
        for batch in folds[fold]
        for column in batch.columns
        for buffer in column.buffers()
        if buffer is not None
    )
    return hash_parts(buffers)[:16]


def _id_type(tokenizer: Any) -> pa.DataType:
    """The Arrow type of stored token ids."""
    return pa.uint16() if len(tokenizer) <= 2**16 else pa.int32()


def _batches(rows: Sequence[EncodedRow], kind: pa.DataType) -> Iterator[pa.RecordBatch]:
    """Rows as record batches of BATCH_ROWS: list<ids>, list<list<ids>>."""
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        inputs = _lists([row.input_ids for row in part], kind)
        targets = _lists([target for row in part for target in row.answers], kind)
        counts = np.cumsum([0, *(len(row.answers) for row in part)], dtype=np.int32)
        nested = pa.ListArray.from_arrays(pa.array(counts), targets)
        yield pa.RecordBatch.from_arrays([inputs, nested], ["input_ids", "targets"])


def _lists(arrays: Sequence[NDArray[np.int32]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values).cast(kind))


def _build(
    folder: Path,
    suite: Suite,
    tokenizer: Any,
    batch: BatchConfig,
    family: Family,
    manifest: dict[str, Any],
    on_bad: str | None,
) -> None:
    """Fill `folder` under another name and rename it; resumes an interrupted build."""
    reading = open_suite(suite, on_bad=on_bad)
    partial = folder.with_name(f".{folder.name}.{platform.node()}.tmp")
    partial.mkdir(exist_ok=True)
    log.info("tokenising into %s", folder)
    progress = Progress(reading.n_tasks, start=0, what="tokenise", unit="task")
    cards = []
    for number, task in enumerate(reading.tasks):
        done = partial / f"{number:05d}.json"
        if not done.is_file():
            card, folds = _tokenise(task, tokenizer, batch, family)
            for fold in FOLDS:
                _write(partial / f"{number:05d}.{fold}.arrow", folds[fold], tokenizer)
            write_json(done, asdict(card))
        cards.append(json.loads(done.read_text(encoding="utf-8")))
        progress.advance(task.name)
    progress.close()
    reading.intake.check()
    reading.intake.write(partial / "rejects.jsonl")
    write_json(partial / "manifest.json", {**manifest, "cards": cards})
    try:
        os.rename(partial, folder)
    except OSError:
        shutil.rmtree(partial)  # another machine has finished first


def _write(path: Path, batches: Sequence[pa.RecordBatch], tokenizer: Any) -> None:
    kind = _id_type(tokenizer)
    schema = pa.schema([("input_ids", pa.list_(kind)), ("targets", pa.list_(pa.list_(kind)))])
    with named(path), path.open("wb") as file:
        with ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


#: Errors of reading a damaged cache.
UNREADABLE = (
    OSError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    pa.ArrowException,
)


def _load(folder: Path, manifest: dict[str, Any], key: str) -> TokenSet:
    """Map a complete cache folder; raises `DataError` if it is damaged or of another manifest."""
    file = folder / "manifest.json"
    way_out = f"delete {folder} to have it made anew"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        cards = [_read_card(card) for card in stored["cards"]]
        # lines end at "\n" alone: a refused text may hold another separator, such as U+2028
        lines = (folder / "rejects.jsonl").read_bytes().split(b"\n")
        rejects = [json.loads(line) for line in lines if line]
        changed = sorted(name for name in manifest if stored.get(name) != manifest[name])
        if changed:
            raise DataError(f"{file}: made from other {', '.join(changed)}; {way_out}")
        tokens = {
            fold: [_map(folder / f"{n:05d}.{fold}.arrow") for n in range(len(cards))]
            for fold in FOLDS
        }
        counts = [(len(t), len(v)) for t, v in zip(tokens["train"], tokens["validation"])]
        if counts != [(card.n_train, card.n_validation) for card in cards]:
            raise DataError(f"{folder}: row counts differ from its manifest; {way_out}")
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{folder}: not a readable token cache ({error!r}); {way_out}") from error
    return TokenSet(
        cards=cards,
        train=tokens["train"],
        validation=tokens["validation"],
        rejects=rejects,
        fingerprint=key,
    )


def _read_card(stored: dict[str, Any]) -> TaskCard:
    gaps = tuple(Gaps(**gaps) for gaps in stored["first_gaps"])
    return TaskCard(**{**stored, "cuts": Cuts(**stored["cuts"]), "first_gaps": gaps})


def _map(path: Path) -> TaskTokens:
    reader = ipc.open_file(pa.memory_map(str(path)))
    batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
    for batch in batches:
        batch.validate(full=True)  # checks the offsets of rows, without reading tokens
    return TaskTokens(batches)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    Rank 0 gets a head start, because it shows the progress; the others wait.
    """
    if rank() and not path.exists():
        time.sleep(1.0)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
