"""Random training programs against a bookkeeper that knows every row.

The bookkeeper follows one rule, "statistics live and die with the gradient they came
with", and does the arithmetic by hand.  Whatever a user's loop does, in whatever order,
the optimizer must arrive at the same matrices.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer
from cg_optim.curvature_store import DECAY, collects_at
from tests.models import LoRALinear, assert_close

N, LAYERS = 5, 4


class Bookkeeper:
    """The expected input curvature of some layers."""

    def __init__(self) -> None:
        self.steps = 0
        self.rows: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        self.gram = [torch.zeros(N, N) for _ in range(LAYERS)]
        self.updates = [0] * LAYERS

    def zero(self) -> None:
        self.rows = [[] for _ in range(LAYERS)]

    def step(self) -> None:
        if collects_at(self.steps):
            for index, rows in enumerate(self.rows):
                if rows:
                    self.updates[index] += 1
                    new = (1 - DECAY) / (1 - DECAY ** self.updates[index])
                    x = torch.cat(rows)
                    self.gram[index] += new * (x.T @ x / len(x) - self.gram[index])
        self.steps += 1
        self.zero()


class Program:
    """A model, its optimizer and what a training loop may do to them."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        torch.manual_seed(seed)
        self.model = nn.ModuleList(LoRALinear(N, 3) for _ in range(LAYERS))
        self.optimizer = CGLoRAOptimizer(self.model, lr=1e-3, curvature="dense")
        self.book = Bookkeeper()
        self.after_step = False
        self.zeroed_in_place = False
        self.kept: list[Tensor] = []

    def backward(self) -> None:
        """One backward through some layers, which may share inputs or run twice."""
        if self.after_step:
            # As every loop does: otherwise the next step repeats old gradients.
            self.zero()
        losses = []
        for _ in range(self.choose.randint(1, 3)):
            x = torch.randn(self.choose.randint(1, 4), N)
            # Zeros written into a gradient are noticed when some layer is used again.
            least = LAYERS if self.zeroed_in_place else 1
            for index in self.choose.sample(range(LAYERS), self.choose.randint(least, LAYERS)):
                losses.append(self.model[index](x).sin().sum() + self.model[index](x[:0]).sum())
                self.book.rows[index].append(x)
        self.choose.shuffle(losses)
        torch.stack(losses).sum().backward()
        self.zeroed_in_place = False

    def step(self) -> None:
        if self.zeroed_in_place:
            return
        self.optimizer.step()
        self.book.step()
        self.after_step = True

    def zero(self) -> None:
        self.zeroed_in_place = self.choose.random() < 0.5
        zero = self.choose.choice([self.optimizer.zero_grad, self.model.zero_grad])
        zero(set_to_none=not self.zeroed_in_place)
        self.book.zero()
        self.after_step = False

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def look(self) -> None:
        """Passes that are never trained on, one of them still alive later."""
        x = torch.randn(3, N)
        with torch.no_grad():
            self.model[0](x)
        self.kept = [self.model[self.choose.randrange(LAYERS)](x)]

    def resume(self) -> None:
        """A new optimizer goes on from saved state, in place of the old one."""
        self.zero()
        self.zeroed_in_place = False
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.remove_hooks()
        self.optimizer = CGLoRAOptimizer(self.model, lr=1e-3, curvature="dense")
        self.optimizer.load_state_dict(saved)

    def copy(self) -> None:
        self.zero()
        self.zeroed_in_place = False
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    def run(self, length: int) -> None:
        frequent = [self.backward] * 6 + [self.step] * 5 + [self.zero] * 2
        for _ in range(length):
            self.choose.choice([*frequent, self.clip, self.look, self.resume, self.copy])()
            if self.after_step:
                self.compare()

    def compare(self) -> None:
        for layer, gram, updates in zip(self.model, self.book.gram, self.book.updates, strict=True):
            state = self.optimizer.state.get(layer.lora_A.weight, {})
            assert int(state.get("input_updates", 0)) == updates
            if updates:
                assert_close(state["input_gram"], gram, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("error::cg_optim.errors.CGOptimWarning")
@pytest.mark.parametrize("seed", range(60))
def test_statistics_are_those_of_the_bookkeeper(seed: int) -> None:
    program = Program(seed)
    program.run(60)
    assert not any(program.optimizer.diagnostics().values())
