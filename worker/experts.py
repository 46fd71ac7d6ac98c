"""How the tokens of a step are shared out among a model's experts."""

from torch import Tensor, nn

from model.moe import MoE


class ExpertLoad:
    """Counts what each expert is given in training, over all layers; padding counts as what it costs.

    The sums stay where the model is, so counting waits for no device. Without experts it counts nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts: list[Tensor] = []
        self.experts = 0
        for layer in model.modules():
            if isinstance(layer, MoE):
                self.experts = len(layer.experts)
                layer.count = self._counts.append

    def take(self) -> list[Tensor]:
        """Tokens of each expert since the last time: [] or one tensor [experts], float64, on the model's device."""
        taken, self._counts[:] = list(self._counts), []
        return [sum(taken[1:], start=taken[0]).double()] if taken else []
