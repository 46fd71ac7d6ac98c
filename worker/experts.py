"""How the tokens of a step are shared out among a model's experts."""

from functools import partial

from torch import Tensor, nn

from model.moe import MoE


class ExpertLoad:
    """Counts what each expert is given in training, over all layers; padding counts as what it costs.

    A layer cuts its tokens into one slice for each expert, and so knows their sizes on the host: counting them costs no
    wait for the device. Without experts it counts nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts: list[float] = []
        for layer in model.modules():
            if isinstance(layer, MoE):
                self._counts = self._counts or [0.0] * len(layer.experts)
                for index, expert in enumerate(layer.experts):
                    expert.register_forward_pre_hook(partial(self._count, index))

    def take(self) -> tuple[float, ...]:
        """Tokens of each expert since the last time; () for a dense model."""
        taken = tuple(self._counts)
        self._counts = [0.0] * len(taken)
        return taken

    def _count(self, index: int, expert: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if expert.training:
            self._counts[index] += len(inputs[0])
