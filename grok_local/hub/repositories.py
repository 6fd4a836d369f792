"""Where each release lies on the hub, which of its files are needed, and what of it lies elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grok_local.errors import OptionError
from grok_local.models import grok1, grok2

__all__ = ["REPOSITORIES", "RemoteFile", "Repository", "repository_of"]


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest` is its SHA-256, or git's SHA-1 for those small enough to be in git."""

    path: str
    size: int
    digest: str

    @property
    def partial_name(self) -> str:
        """What it is called while it grows: never the same for two files, or for two versions of one."""
        return f"{self.path.replace('/', '_')}.{self.digest[:16]}.partial"

    @property
    def stamp(self) -> tuple[int, int]:
        """Two numbers that tell its versions apart, wherever it is, and also when it is gone."""
        return self.size, int(self.digest[:16], 16)


@dataclass(frozen=True)
class Repository:
    """A release's repository: `tensors` are the paths of its `count` large files, `others` what is needed beside.

    `example` tells people what was looked for. `tokenizer` is fetched from `tokenizer_url` where the repository has
    none.
    """

    hub: str
    tensors: re.Pattern[str]
    count: int
    example: str
    others: frozenset[str] = frozenset()
    tokenizer: RemoteFile | None = None
    tokenizer_url: str = ""

    def needs(self, path: str) -> bool:
        """Whether a file of this path belongs to the checkpoint."""
        return path in self.others or self.tensors.fullmatch(path) is not None


_TOKENIZER_1 = RemoteFile(
    "tokenizer.model", 2_229_219, "5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f"
)

REPOSITORIES = {
    grok1.RELEASE.name: Repository(
        hub=grok1.RELEASE.hub,
        tensors=re.compile(r"ckpt(-0)?/tensor\d{5}_\d{3}"),
        count=770,
        example="ckpt-0/tensor00000_000",
        tokenizer=_TOKENIZER_1,
        tokenizer_url="https://raw.githubusercontent.com/xai-org/grok-1/main/tokenizer.model",
    ),
    grok2.RELEASE.name: Repository(
        hub=grok2.RELEASE.hub,
        tensors=re.compile(r"pytorch_model-\d{5}-TP-(common|\d{3})\.safetensors"),
        count=39,
        example="pytorch_model-00000-TP-common.safetensors",
        others=frozenset({"config.json", "tokenizer.tok.json"}),
    ),
}


def repository_of(release: str) -> Repository:
    """Raises OptionError."""
    if release not in REPOSITORIES:
        raise OptionError(f"no release {release!r} to pull: choose {' or '.join(REPOSITORIES)}")
    return REPOSITORIES[release]
