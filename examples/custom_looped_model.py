"""A looped model of your own, for something that is not language: running parity.

    python examples/custom_looped_model.py

For a row of bits, say at every place whether the number of ones so far is odd. The model sees one
place to each side, so the answer at place 30 needs 30 loops: one loop cannot know it, and more
loops reach further. It is trained on rows of 16 bits and then asked about rows of 32.

The task is that of Schwarzschild et al. (arXiv 2106.04537), who loop convolutions. Feeding the
input to every loop, so that long runs do not forget it, is from Bansal et al. (arXiv 2202.05826).

The four parts are the library's, and none of them knows about tokens: LTIInjection carries the
state, MoEFFN thinks, LoRAAdapter lets the first loop differ from the others, and ACTHalting learns
when a place is done.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos import ACTHalting, LoRAAdapter, LTIInjection, MoEFFN, MythosConfig, RMSNorm

DIM = 32
EXPERTS = MythosConfig(dim=DIM, n_experts=4, n_experts_per_tok=2, n_shared_experts=1, expert_dim=32)


class RunningParity(nn.Module):
    """h <- A h + B e, then a convolution, experts and an adapter; the answer is read from h."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Embedding(2, DIM)
        self.injection = LTIInjection(DIM)  # rho(A) < 1: the linear part decays, however many loops
        self.look = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.norms = nn.ModuleList(RMSNorm(DIM) for _ in range(4))
        self.experts = MoEFFN(EXPERTS)
        # Two depths: loop 0, which knows nothing yet, and all later ones (the last index is kept).
        self.adapter = LoRAAdapter(DIM, rank=4, max_loops=2)
        self.head = nn.Linear(DIM, 1)
        self.gate = ACTHalting(DIM)  # linear: it can only see what the state shows

    def states(self, bits_BT: Tensor, n_loops: int) -> Iterator[Tensor]:
        """The state (B, T, D) after every loop."""
        drive = self.injection.drive(self.encode(bits_BT))  # the same at every loop
        h = torch.zeros_like(drive)
        for t in range(n_loops):
            h = self.injection.hold(h) + drive
            h = h + self.look(self.norms[0](h).mT).mT
            h = h + self.experts(self.norms[1](h))
            h = h + self.adapter(self.norms[2](h), t)
            yield h

    def read(self, h_BTD: Tensor) -> Tensor:
        """Logit of "odd" at every place, (B, T), that a state stands for."""
        return self.head(self.norms[3](h_BTD)).squeeze(-1)

    def forward(self, bits_BT: Tensor, n_loops: int) -> Tensor:
        """Logit of "odd" after ``n_loops`` loops, (B, T)."""
        *_, h_BTD = self.states(bits_BT, n_loops)
        return self.read(h_BTD)


def draw(length: int, generator: torch.Generator, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Random bits (B, T) and whether the ones so far are odd, (B, T) as 0 or 1."""
    bits_BT = torch.randint(2, (batch, length), generator=generator)
    return bits_BT, (bits_BT.cumsum(1) % 2).float()


def train(model: RunningParity, steps: int, generator: torch.Generator) -> None:
    """The trajectory first: a random number of loops, and the loss at the last one.

    Sometimes there are too few loops for the answer. The best reply is then "even odds", so the
    model learns what it does not know yet: that is what the gate will see.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        bits_BT, odd_BT = draw(16, generator)
        n_loops = int(torch.randint(1, 21, (), generator=generator))
        loss = F.binary_cross_entropy_with_logits(model(bits_BT, n_loops), odd_BT)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            with torch.no_grad():
                enough = F.binary_cross_entropy_with_logits(model(bits_BT, 16), odd_BT)
            print(f"step {step:4d}   loss at 16 loops {enough.item():.4f}")


def train_gate(model: RunningParity, steps: int, generator: torch.Generator) -> None:
    """Then the gate, on the frozen model: halt where further loops gain nothing."""
    optimizer = torch.optim.AdamW(model.gate.parameters(), lr=3e-2)
    for _ in range(steps):
        bits_BT, odd_BT = draw(16, generator)
        with torch.no_grad():
            h_LBTD = torch.stack(list(model.states(bits_BT, 20)))
            said_LBT = model.read(h_LBTD)
            loss_LBT = F.binary_cross_entropy_with_logits(
                said_LBT, odd_BT.expand_as(said_LBT), reduction="none"
            )
            done_LBT = (loss_LBT < loss_LBT[-1] + 0.1).float()
        loss = F.binary_cross_entropy(model.gate(h_LBTD), done_LBT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def report(model: RunningParity, generator: torch.Generator) -> None:
    """Accuracy by place and number of loops on longer rows; then where the gate stops."""
    bits_BT, odd_BT = draw(32, generator, batch=256)
    h_LBTD = torch.stack(list(model.states(bits_BT, 40)))
    right_LBT = ((model.read(h_LBTD) > 0) == odd_BT.bool()).float()

    def row(label: str, values_BT: Tensor, form: str) -> None:
        bands = values_BT.unflatten(1, (4, 8)).mean((0, 2)).tolist()
        print(f"{label:>14}" + "".join(f"{value:>11{form}}" for value in bands))

    print("\naccuracy on rows of 32 bits (trained on 16; chance is 50 %)")
    print(f"{'loops':>14}{'places 1-8':>11}{'9-16':>11}{'17-24':>11}{'25-32':>11}")
    for n_loops in (1, 4, 8, 16, 24, 32, 40):
        row(str(n_loops), right_LBT[n_loops - 1], ".1%")

    exits_BT = model.gate.exit_loops(model.gate(h_LBTD))
    print("\nwith the gate, each place on its own")
    row("loops", 1.0 + exits_BT, ".1f")
    row("accuracy", right_LBT.gather(0, exits_BT[None])[0], ".1%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of the model")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = RunningParity()
    train(model, steps, generator)
    train_gate(model, steps // 4, generator)
    report(model, generator)


if __name__ == "__main__":
    main()
