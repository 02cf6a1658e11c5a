import json
import re
from pathlib import Path

import numpy as np
import pytest

from pellucid.cli.main import main
from pellucid.quant.formats import BlockFormat
from tests.support.gguf_writer import encode, write_gguf

METADATA = {
    "general.architecture": "llama",
    "general.name": "a name \x1b[31m",
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{index}" for index in range(100)],
    "long": "y" * 1000,
    "scale": float("nan"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "token_embd.weight": encode(np.ones((100, 64), np.float32), BlockFormat.Q8_0),
        "output_norm.weight": np.ones(64, np.float32),
    }
    return write_gguf(tmp_path / "tiny.gguf", METADATA, tensors)


def test_summary(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == "6,464 (6.46k)"
    assert facts["head dim"] == "16"
    assert facts["vocab size"] == "100"
    assert facts["name"] == r"a name \x1b[31m"
    assert facts["supported"].startswith("no: ")


def test_formats_add_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["formats"] == [
        {"format": "Q8_0", "tensors": 1, "parameters": 6400, "bytes": 100 * 2 * 34},
        {"format": "F32", "tensors": 1, "parameters": 64, "bytes": 256},
    ]
    assert [tensor["name"] for tensor in described["tensors"]] == ["token_embd.weight", "output_norm.weight"]
    assert described["tensors"][0]["shape"] == [100, 64]
    assert described["summary"]["parameters"] == sum(tensor["parameters"] for tensor in described["formats"])


def test_json_counts_what_it_leaves_out_and_stays_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(file), "--json"])
    metadata = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["metadata"]
    assert metadata["tokenizer.ggml.tokens"] == {"length": 100, "first": ["t0", "t1", "t2", "t3"]}
    assert metadata["scale"] == "nan"
    assert metadata["long"] == "y" * 1000


def test_tensors_and_metadata(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--tensors", "--metadata"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["token_embd.weight", "Q8_0", "100", "x", "64", "6,800"] in lines
    assert ["tokenizer.ggml.tokens", "['t0',", "'t1',", "'t2',", "'t3',", "...", "(96", "more)]"] in lines
    assert ["long", "y" * 160, "...", "(840", "more", "characters)"] in lines


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: magic")
