"""Good files and settings, and what fuzzing makes of them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import scipy.sparse

from gpu_init import config
from gpu_init.artifact.objects import open_staging

USERS, ITEMS, WIDTH = 12, 9, 4
PROCESS_BYTES = 3 << 30  # that a case may allocate beyond what there was before the first
COMMAND_BYTES = 1 << 30  # that a command may have in memory
CASE_SECONDS = 20  # of the processor
CHUNK = 2000  # cases per process, so that a crash costs one of them and is seen
ROOT = Path(__file__).resolve().parents[2]


# Good files, by name; the part before the slash is the reader's.


def _log():
    rng = np.random.default_rng(0)
    users = np.concatenate([np.arange(USERS), rng.integers(0, USERS, 30)])
    items = np.concatenate([np.arange(USERS) % ITEMS, rng.integers(0, ITEMS, 30)])
    return pd.DataFrame(
        {"user_id": users, "item_id": items, "rating": rng.integers(1, 9, 42) / 4, "split": ["train", "test"] * 21}
    )


def _saved(save):
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def corpus():
    """Good files: name to content."""
    log = _log()
    texts = log.assign(user_id="u" + log["user_id"].astype(str))
    values = np.random.default_rng(1).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    values[3] = np.nan
    matrix = scipy.sparse.csr_array((log["rating"], (log["user_id"], log["item_id"])), (USERS, ITEMS))
    csv = log.to_csv(index=False)
    ids = np.arange(ITEMS)
    lists = pa.table({"item_id": ids, "v": list(values)})
    columns = pa.table({"item_id": [f"i{item}" for item in ids], **{f"v{c}": values[:, c] for c in range(WIDTH)}})
    files = {
        "interactions/log.parquet": _saved(log.to_parquet),
        "interactions/texts.parquet": _saved(texts.to_parquet),
        "interactions/zstd.parquet": _saved(lambda file: texts.to_parquet(file, compression="zstd")),
        "interactions/log.csv": csv.encode(),
        "interactions/quoted.csv": texts.to_csv(index=False, quoting=1).encode(),
        "interactions/log.tsv": log.to_csv(index=False, sep="\t").encode(),
        "interactions/log.inter": texts.rename(columns="{}:token".format).to_csv(index=False, sep="\t").encode(),
        "interactions/log.csv.gz": gzip.compress(csv.encode(), mtime=0),
        **{
            f"interactions/{kind}.npz": _saved(
                lambda file, kind=kind: scipy.sparse.save_npz(file, matrix.asformat(kind))
            )
            for kind in ("csr", "csc", "coo", "dia", "bsr")
        },
        "users/users.txt": "".join(f"{user}\n" for user in range(USERS)).encode(),
        "users/users.csv": ("user_id\n" + "".join(f"u{user}\n" for user in range(USERS))).encode(),
        "users/users.parquet": _saved(pd.DataFrame({"user_id": np.arange(USERS)}).to_parquet),
        "features/f4.npy": _saved(lambda file: np.save(file, values)),
        "features/f2.npy": _saved(lambda file: np.save(file, values.astype(np.float16))),
        "features/f8.npy": _saved(lambda file: np.save(file, np.asfortranarray(values.astype(">f8")))),
        "features/plain.npz": _saved(lambda file: np.savez(file, values)),
        "features/packed.npz": _saved(lambda file: np.savez_compressed(file, values)),
        "features/f4.safetensors": safetensors.numpy.save({"image": values}, {"made": "here"}),
        "features/lists.parquet": _saved(lambda file: pq.write_table(lists, file)),
        "features/columns.parquet": _saved(lambda file: pq.write_table(columns, file, compression="gzip")),
        "config/job.toml": "\n".join(toml_lines()).encode(),
    }
    with contextlib.suppress(ImportError):
        import torch

        files["features/tensor.pt"] = _saved(lambda file: torch.save(torch.from_numpy(values), file))
        files["features/state.pt"] = _saved(lambda file: torch.save({"image": torch.from_numpy(values)}, file))
    with tempfile.TemporaryDirectory() as folder:
        _artifact(Path(folder) / "out", values)
        for path in sorted(Path(folder, "out").rglob("*.*")):
            files[f"artifact/{path.relative_to(Path(folder) / 'out')}"] = path.read_bytes()
    return files


def _artifact(out, values):
    users = np.random.default_rng(2).normal(size=(USERS, WIDTH)).astype(np.float32)
    with open_staging(out, resume=False, overwrite=False, identity={}) as staging:
        staging.save("image/users.npy", users)
        staging.save("image/centroids.npy", users[:3])
        staging.save("image/labels.npy", np.zeros(USERS, np.int32))
        staging.save("image/items.npy", np.nan_to_num(values))
        staging.save("image/items_mask.npy", np.isfinite(values[:, 0]))
        table = pd.DataFrame({"row": np.arange(USERS), "user_id": [f"u{user}" for user in range(USERS)]})
        staging.save_table("users.parquet", table)
        staging.commit({"users": {"rows": USERS}, "items": {"rows": ITEMS}, "modalities": {"image": {"width": WIDTH}}})


def toml_lines():
    """Lines of a good job file."""
    lines = {
        "interactions": '"log.parquet"',
        "out": '"out"',
        "user_column": '"user_id"',
        "where": "\"split == 'train'\"",
        "users": "12",
        "lambda": "0.9",
        "clusters": "3",
        "cluster_on": '"users"',
        "weighting": '"sym"',
        "dim": "2",
        "whiten": "true",
        "dtype": '"float16"',
        "seed": "7",
        "memory": '"1.5GiB"',
    }
    return [*(f"{key} = {value}" for key, value in lines.items()), "[features]", 'image = "f4.npy"']


# Spoiling.

NUMBERS = [
    number.to_bytes(size, order, signed=number < 0)
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    for number in (-1, 0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size) - 1 if size else 0)
]
PIECES = [
    *(b"", b"\n", b"\r\n", b"\n\n", b'"', b"'", b",", b"\t", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b"-1", b"99", b"1e400", b"nan", b"inf", b"9999999999999999999999", b"0.5", b"1.0", b"x", b" ", b"=", b"PAR1"),
    *(b"PK\5\6", b"PK\1\2", b"\x93NUMPY\x01\x00", b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }"),
    *(b"(1000000000000, 4)", b"F64", b"BF16", b'"data_offsets":[0,99999999999]', b"[[[[[[[[", b"..", b"../", b"{}"),
]


def edits(rng):
    """A few changes to a file, each a tuple that `spoilt` understands."""
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.4 else 1):
        kind = ("flip", "flip", "set", "insert", "remove", "repeat", "cut")[rng.integers(7)]
        piece = (NUMBERS, PIECES)[rng.integers(2)]
        payload = piece[rng.integers(len(piece))] if rng.random() < 0.8 else rng.bytes(int(rng.integers(1, 40)))
        yield kind, int(rng.integers(1 << 30)), payload, int(rng.integers(1, 64))


def spoilt(data, changes):
    """Content with changes made to it, in turn."""
    data = bytearray(data)
    for kind, place, payload, size in changes:
        at = place % (len(data) + 1)
        match kind:
            case "flip":
                if at < len(data):
                    data[at] ^= 1 << size % 8
            case "set":
                data[at : at + len(payload)] = payload
            case "insert":
                data[at:at] = payload
            case "remove":
                del data[at : at + size]
            case "repeat":
                data[at:at] = data[at : at + size] * (1 + place % 50)
            case "cut":
                del data[at:]
    return bytes(data)


WORDS = [
    *("rating", "user_id", "split", "time", "flag", "missing", "`rating`", "`a b`", "`", "x"),
    *("and", "or", "not", "in", "AND", "Not", "true", "false", "(", ")", "[", "]", ",", "((", "))"),
    *("==", "=", "!=", "<>", "<", "<=", ">", ">=", "===", "!", "&", "-", "+"),
    *("1", "0", "-0.5", ".5", "1.", "1e5", "9" * 20, "9" * 301, "'train'", '"test"', "''''", "'", '"', "'2024-01-31'"),
    *("'2024-01-31 18:00+02:00'", "'0001-01-01'", "'9999-12-31'", "\0", "\ud800", "é", "\n", "#"),
]
VALUES = [
    *("", " ", "0", "-1", "1", "3", "2.5", "nan", "inf", "-inf", "1e9", "1e400", "9" * 30, "0x10", "1_000", "٣"),
    *("true", "false", "yes", "off", "auto", "users", "items", "sym", "float16", "4GB", "1kB", "1PB", "-1GB", "0"),
    *("image=f4.npy", "image", "=", "a/b=x", "..=x", "x" * 500, "\0", "\udcff", "no://a/b", "a,b", "image=a,image=b"),
    *("rating > 1", "rating >", "(" * 99, "../../x", "/dev/null", "a\nb", "\x1b[2J", "'", '"'),
]
TOML_VALUES = [
    *map(json.dumps, [*VALUES[:40], 0, -1, 1, 2.5, True, [], {}, [1], 2**63, "a"]),
    "nan",
    "inf",
    "[[]]",
    "{a=1}",
]


NAMES = [key.name for key in config.KEYS]


def condition(rng):
    """Words of ``--where``, in an order that means something now and then."""
    if rng.random() < 0.5:
        words = [WORDS[rng.integers(len(WORDS))] for _ in range(int(rng.integers(1, 12)))]
        return (" ", "")[rng.integers(2)].join(words)
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        column, sign = WORDS[rng.integers(0, 8)], WORDS[rng.integers(25, 33)]
        parts += [column, sign, WORDS[rng.integers(38, len(WORDS))], ("and", "or")[rng.integers(2)]]
    return " ".join(parts[:-1])


def settings(rng):
    """Keys and values: text, as in flags and variables, and as TOML."""
    chosen = {NAMES[rng.integers(len(NAMES))] for _ in range(int(rng.integers(1, 5)))}
    return {name: VALUES[rng.integers(len(VALUES))] for name in chosen}


def toml(rng):
    """A job file whose keys have other values."""
    lines = toml_lines()
    for _ in range(int(rng.integers(1, 5))):
        line = f"{NAMES[rng.integers(len(NAMES))]} = {TOML_VALUES[rng.integers(len(TOML_VALUES))]}"
        lines.insert(int(rng.integers(len(lines))), line)
    return "\n".join(lines)
