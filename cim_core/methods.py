"""Names of methods and what they build; adding one is a line here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cim_core.cim import CIM
from cim_core.config import ModelConfig
from cim_core.peers.beit import Beit
from cim_core.peers.mae import MAE
from cim_core.peers.simmim import SimMIM
from cim_core.pretraining import Pretraining, build
from cim_core.tokenizers.base import Tokenizer

METHODS: Mapping[str, Callable[..., Pretraining]] = MappingProxyType(
    {"cim": CIM, "beit": Beit, "simmim": SimMIM, "mae": MAE}
)


def build_model(config: ModelConfig, tokenizer: Tokenizer | None = None, *, seed: int = 0) -> Pretraining:
    """The model that `config` names, its initial weights a function of `seed`.

    With one seed, the encoders of all methods start with the same weights. `tokenizer` is the frozen one
    of `cim` and `beit`. Raises ModelError or ConfigError where something named cannot be built.
    """
    return build(METHODS[config.method], config, tokenizer, seed=seed)
