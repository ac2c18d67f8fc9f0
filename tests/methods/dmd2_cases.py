"""DMD2 written down once more, in double precision, in one process, with diffusers' own class.

Nothing of megagen's methods is used here but the names under which random numbers are drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.optimizer import has_weight_decay
from megagen.engine.role import Role
from megagen.fastgen.video_discriminators import Discriminator_VideoDiT
from megagen.methods.base import RunFacts
from megagen.methods.dmd2 import DMD2Method
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from tests.engine import cases

SEED = 77
NUM_BATCHES = 4
SHIFT = 3.0
ROLES = ("student", "teacher", "critic")
# Gradients are not clipped here, and Adam magnifies the rounding of one that nearly vanishes by
# learning rate / eps: with 1e-4 curves were off by up to 8e-6, and once by more than 1e-5.
ADAMW = replace(cases.ADAMW, max_grad_norm=0.0, use_distributed_optimizer=False, eps=1e-2)
CRITIC = replace(ADAMW, learning_rate=3e-3, betas=(0.5, 0.9))
HEADS = replace(ADAMW, learning_rate=2e-3)
GRID = (3, 1, 5)
"""Tokens of ``cases.SIZE``."""
LATENTS = (3, *cases.SIZE)


def batches(
    step: int,
    *,
    text_only: bool = False,
    shape: tuple[int, int, int, int] = LATENTS,
    count: int = NUM_BATCHES,
) -> list[Batch]:
    """All micro-batches of a step; a function of the step."""
    generator = torch.Generator().manual_seed(500 + step)
    found = []
    for number in range(count):
        first = (step * count + number) * cases.BATCH
        positions = tuple(range(first, first + cases.BATCH))
        latents = torch.randn(cases.BATCH, *shape, generator=generator)
        text = torch.randn(cases.BATCH, 5, 6, generator=generator)
        names = tuple(map(str, positions))
        found.append(
            Batch(
                None if text_only else latents,
                {"text_embeds_BLD": text},
                positions,
                names,
                names,
                shape,
            )
        )
    return found


def facts() -> RunFacts:
    """A negative prompt of 4 tokens, to be padded to the samples' 5."""
    negative = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    return RunFacts(unconditional={"negative": negative}, optimizer=HEADS)


# -- megagen, run in ranks -----------------------------------------------------------------------
def make_method(
    weights: Sequence[cases.Weights],
    data: ParallelDims,
    layouts: Sequence[ParallelDims],
    options: Mapping[str, Any],
    schedule: str = "replay",
    **settings: Any,
) -> DMD2Method:
    """The method over three roles."""
    roles: dict[str, Role] = {}
    for name, tensors, dims in zip(ROLES, weights, layouts, strict=True):
        own = {"optimizer": CRITIC if name == "critic" else ADAMW, "score_schedule": schedule}
        own |= settings
        if name == "teacher":
            own = {"trainable": False}
        roles[name] = cases.make_role(tensors, dims, data=data, name=name, **own)
    parsed = parse_options(DMD2Method.Options, options, "method")
    DMD2Method.check(parsed, {name: role.plugin for name, role in roles.items()})
    method = DMD2Method(roles, parsed, Streams(SEED), facts())
    if method.adversary is not None:
        cases.without_kinks(method.adversary.heads)
    return method


def own_batches(step: int, mesh: Mesh, **kind: Any) -> list[Batch]:
    """Those of this rank's data rank."""
    everyone = batches(step, **kind)
    share = len(everyone) // mesh.dp_size
    return everyone[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]


def gradients_of(role: Role) -> dict[str, Tensor]:
    """After a step of the plain optimizer without clipping."""
    return cases.whole(role, lambda p: p.main_grad)


# -- the reference -------------------------------------------------------------------------------
@contextlib.contextmanager
def true_double() -> Iterator[None]:
    """diffusers rounds norms to float32 in between; not in here."""
    original = torch.Tensor.float

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else original(self, *args, **kwargs)

    torch.Tensor.float = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = original  # type: ignore[method-assign]


class Reference:
    """Three networks in double precision and DMD2's two losses.

    Args:
        weights: of student, teacher and critic.
        options: of the method, all keys that are used given.
    """

    def batches(self, step: int) -> list[Batch]:
        return batches(step)

    def __init__(self, weights: Sequence[cases.Weights], options: Mapping[str, Any]) -> None:
        settings = (ADAMW, ADAMW, CRITIC)
        nets = [cases.PlainModel(w, s) for w, s in zip(weights, settings, strict=True)]
        for net in nets:
            net.model.double()
        self.student, self.teacher, self.critic = nets
        self.o = {
            "student_sample_type": "sde",
            "real_score_guidance_scale": 1.0,
            "fake_score_guidance_scale": 1.0,
            "generator_update_interval": 1,
            "vsd_normalizer": "sample",
            "fake_score_pred_type": "flow",
            "share_rollout": True,
            "min_timestep_ratio": 0.0,
            "max_timestep_ratio": 1.0,
            "gan_loss_weight_gen": 0.0,
            "gan_r1_reg_weight": 0.0,
            "gan_r1_at": "clean",
            **options,
        }
        steps = [float(t) for t in self.o["dmd_denoising_steps"]]
        if self.o.get("warp_denoising_step"):
            steps = [1000 * SHIFT * t / (1000 + (SHIFT - 1) * t) for t in steps]
        self.steps = [float(torch.tensor(t)) for t in steps]  # the networks see float32
        simulates = self.o["rollout_mode"] == "simulate"
        self.share = self.o.get("student_step_per") or ("step" if simulates else "sample")
        self.streams = Streams(SEED)
        if self.o["gan_loss_weight_gen"]:
            self._make_heads()

    def _make_heads(self) -> None:
        own = self.o["discriminator"]
        self.source: cases.PlainModel = getattr(self, own.get("feature_source", "teacher"))
        self.blocks = sorted(own["feature_indices"])
        generator = self.streams.generator("discriminator")
        options = {"head": own["head"], "width": own["width"], "generator": generator}
        hidden = cases.ARCH["num_attention_heads"] * cases.ARCH["attention_head_dim"]
        heads = Discriminator_VideoDiT(self.blocks, cases.ARCH["num_layers"], hidden, **options)
        cases.without_kinks(heads)
        self.heads = heads.double()
        named = list(self.heads.named_parameters())
        groups = [
            {"params": [p for n, p in named if has_weight_decay(p, n) == decays]}
            | {"weight_decay": HEADS.weight_decay * decays}
            for decays in (True, False)
        ]
        self.head_optimizer = torch.optim.AdamW(
            groups, lr=HEADS.learning_rate, betas=HEADS.betas, eps=HEADS.eps
        )

    # -- random numbers --------------------------------------------------------------------------
    def normal(
        self, purpose: str, step: int, batch: Batch, shape: Sequence[int] | None = None
    ) -> Tensor:
        found = [
            torch.randn(
                tuple(shape or batch.latent_shape),
                generator=self.streams.generator(purpose, step, p),
            )
            for p in batch.positions
        ]
        return torch.stack(found).double()

    def keys(self, share: str, batch: Batch) -> list[int]:
        one = {"step": -1, "micro_batch": batch.positions[0]}
        return [one.get(share, p) for p in batch.positions]

    def chosen(self, rollout: str, step: int, batch: Batch) -> list[int]:
        return [
            int(
                torch.randint(
                    0,
                    len(self.steps),
                    (),
                    generator=self.streams.generator(f"{rollout}/step", step, key),
                )
            )
            for key in self.keys(self.share, batch)
        ]

    def score_times(self, loss: str, step: int, batch: Batch) -> Tensor:
        per = self.o.get("score_timestep_per", "sample")
        found = []
        for key in self.keys(per, batch):
            generator = self.streams.generator(f"{loss}/score_timestep", step, key)
            u = 1 - float(torch.rand((), generator=generator))
            t = 1000 * SHIFT * u / (1 + (SHIFT - 1) * u)
            low, high = 1000 * self.o["min_timestep_ratio"], 1000 * self.o["max_timestep_ratio"]
            found.append(min(max(t, low), high))
        return torch.tensor(found, dtype=torch.float64).float()

    # -- networks --------------------------------------------------------------------------------
    def velocity(self, net: cases.PlainModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return net.model(x, t, text.double(), return_dict=False)[0]

    def x0(self, net: cases.PlainModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x - wide(t) * self.velocity(net, x, t, text)

    def guided(
        self, net: cases.PlainModel, x: Tensor, t: Tensor, text: Tensor, scale: float
    ) -> Tensor:
        cond = self.x0(net, x, t, text)
        if scale == 1:
            return cond
        negative = torch.zeros_like(text)
        negative[:, :4] = facts().unconditional["negative"]
        uncond = self.x0(net, x, t, negative)
        return uncond + scale * (cond - uncond)

    def logits(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Of the discriminator, with everything differentiable."""
        taken: list[Tensor] = []

        def take(module: Any, inputs: Any, tokens_BND: Tensor) -> None:
            taken.append(tokens_BND.transpose(1, 2).unflatten(2, GRID))

        hooks = [self.source.model.blocks[b].register_forward_hook(take) for b in self.blocks]
        self.velocity(self.source, x, t, text)
        for hook in hooks:
            hook.remove()
        return self.heads(taken)

    # -- the algorithm ---------------------------------------------------------------------------
    def student_input(self, loss: str, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x_t, t) at the timestep that each sample is trained at."""
        chosen, text = (
            self.chosen(f"{loss}/rollout", step, batch),
            batch.condition["text_embeds_BLD"],
        )
        if self.o["rollout_mode"] == "data_latent":
            t = torch.tensor([self.steps[j] for j in chosen])
            eps = self.normal(f"{loss}/rollout/noise/0", step, batch)
            assert batch.latents_BCTHW is not None
            return (1 - wide(t)) * batch.latents_BCTHW.double() + wide(t) * eps, t
        x = self.normal(f"{loss}/rollout/noise/0", step, batch) * self.steps[0] / 1000
        inputs = [x]
        for k in range(max(chosen)):
            t, below = (torch.full((cases.BATCH,), self.steps[k + i]) for i in (0, 1))
            x0 = self.x0(self.student, x, t, text)
            eps = (x - (1 - wide(t)) * x0) / wide(t)
            if self.o["student_sample_type"] == "sde":
                eps = self.normal(f"{loss}/rollout/noise/{k + 1}", step, batch)
            x = (1 - wide(below)) * x0 + wide(below) * eps
            inputs.append(x)
        rows = torch.stack([inputs[j][i] for i, j in enumerate(chosen)])
        return rows.detach(), torch.tensor([self.steps[j] for j in chosen])

    def sample(self, loss: str, step: int, batch: Batch) -> Tensor:
        """The student's x0, differentiable where gradients are recorded."""
        with torch.no_grad():
            x, t = self.student_input(loss, step, batch)
        return self.x0(self.student, x, t, batch.condition["text_embeds_BLD"])

    def renoised(self, loss: str, step: int, batch: Batch, x0: Tensor) -> tuple[Any, ...]:
        t, eps = (
            self.score_times(loss, step, batch),
            self.normal(f"{loss}/score_noise", step, batch),
        )
        return (1 - wide(t)) * x0 + wide(t) * eps, t, eps

    def student_loss(self, step: int, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What is differentiated for one micro-batch, its samples, and the losses' values."""
        text = batch.condition["text_embeds_BLD"]
        x0 = self.sample("student", step, batch)
        with torch.no_grad():
            x_t, s, _ = self.renoised("student", step, batch, x0)
            fake_scale, real_scale = (self.o[f"{n}_score_guidance_scale"] for n in ("fake", "real"))
            fake = self.guided(self.critic, x_t, s, text, fake_scale)
            real = self.guided(self.teacher, x_t, s, text, real_scale)
        frames = self.o.get("gradient_frames") or x0.shape[2]
        x0_w, fake, real = (v[:, :, -frames:] for v in (x0, fake, real))
        axes = (1, 2, 3, 4) if self.o["vsd_normalizer"] == "sample" else (0, 1, 2, 3, 4)
        distance = (x0_w.detach() - real).abs().mean(axes, keepdim=True)
        g = (fake - real) / (distance + 1e-6)
        target = (x0_w - g).detach()
        terms = {"generator": 0.5 * (x0_w - target).square().mean()}
        total = terms["generator"]
        if self.o["gan_loss_weight_gen"]:
            leaf = x0.detach().requires_grad_()
            x_t, s, _ = self.renoised("student", step, batch, leaf)
            terms["gan_gen"] = F.softplus(-self.logits(x_t, s, text)).mean()
            (gradient,) = torch.autograd.grad(terms["gan_gen"], leaf)
            total = total + self.o["gan_loss_weight_gen"] * (x0 * gradient).sum()
        return total, x0.detach(), terms

    def discriminator_loss(self, step: int, batch: Batch, x0: Tensor) -> dict[str, Tensor]:
        """Its terms; features are constants of it."""
        text = batch.condition["text_embeds_BLD"]
        assert batch.latents_BCTHW is not None
        real = batch.latents_BCTHW.double()
        like = "critic" if self.o.get("gan_use_same_t_noise") else "real"
        x_t, t, _ = self.renoised("critic", step, batch, x0)
        y_t, t_real, _ = self.renoised(like, step, batch, real)
        real_logits, fake_logits = self.logits(y_t, t_real, text), self.logits(x_t, t, text)
        disc = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        terms = {"gan_disc": disc}
        if self.o["gan_r1_reg_weight"]:
            base = real if self.o["gan_r1_at"] == "clean" else y_t
            moved = base + self.o["gan_r1_reg_alpha"] * self.normal("real/r1_noise", step, batch)
            terms["r1"] = (real_logits - self.logits(moved, t_real, text)).square().mean()
        return terms

    def critic_loss(self, step: int, batch: Batch, x0: Tensor) -> Tensor:
        x_t, t, eps = self.renoised("critic", step, batch, x0)
        v = self.velocity(self.critic, x_t, t, batch.condition["text_embeds_BLD"])
        s, space = wide(t), self.o["fake_score_pred_type"]
        error = v - (eps - x0)
        # x0 = x_t - s v, eps = x_t + (1 - s) v, v = (1 - s) eps - s x0: linear in the velocity
        factor = {"flow": 1.0, "x0": s, "eps": 1 - s, "v": (1 - s) ** 2 + s**2}[space]
        return (factor * error).square().mean()

    def step(self, step: int) -> dict[str, Any]:
        """One iteration: losses, gradient norms, gradients; the weights move."""
        moves_student = (step + 1) % self.o["generator_update_interval"] == 0
        moves_critic = self.o.get("critic_on_student_steps", True) or not moves_student
        found: dict[str, Any] = {}
        with true_double():
            everyone = self.batches(step)
            for batch in everyone:
                x0 = None
                if moves_student:
                    loss, x0, terms = self.student_loss(step, batch)
                    (loss / len(everyone)).backward()
                    for name, value in terms.items():
                        add(found, f"loss/{name}", value.item() / len(everyone))
                if not moves_critic:
                    continue
                if x0 is None or not self.o["share_rollout"]:
                    with torch.no_grad():
                        x0 = self.sample("critic", step, batch)
                loss = self.critic_loss(step, batch, x0)
                (loss / len(everyone)).backward()
                add(found, "loss/fake_score", loss.item() / len(everyone))
                if self.o["gan_loss_weight_gen"]:
                    self.judge(found, step, batch, x0)
        weights = {"gan_gen": self.o["gan_loss_weight_gen"], "r1": self.o["gan_r1_reg_weight"]}
        found["loss/total"] = sum(weights.get(k[5:], 1.0) * v for k, v in found.items())
        if "loss/gan_disc" in found:
            self.move_heads(found)
        for name, moves in (("student", moves_student), ("critic", moves_critic)):
            net: cases.PlainModel = getattr(self, name)
            if moves:
                found[name] = {n: g.clone() for n, g in net.gradients().items()}
                found[f"grad_norm/{name}"] = net.step()
        return found

    def judge(self, found: dict[str, Any], step: int, batch: Batch, x0: Tensor) -> None:
        """Add a micro-batch to the gradients of the heads alone."""
        terms = self.discriminator_loss(step, batch, x0)
        loss = terms["gan_disc"] + self.o["gan_r1_reg_weight"] * terms.get("r1", 0.0)
        parameters = list(self.heads.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss / NUM_BATCHES, parameters), strict=True
        ):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for name, value in terms.items():
            add(found, f"loss/{name}", value.item() / NUM_BATCHES)

    def move_heads(self, found: dict[str, Any]) -> None:
        named = dict(self.heads.named_parameters())
        found["discriminator"] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        norms = [g.norm() for g in found["discriminator"].values()]
        found["grad_norm/discriminator"] = float(torch.stack(norms).norm())
        self.head_optimizer.step()
        self.head_optimizer.zero_grad()


class Curve:
    """A reference's steps, each made once, however many are asked for."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._made: list[dict[str, Any]] = []

    def first(self, num_steps: int) -> list[dict[str, Any]]:
        """What the first so many steps give."""
        while len(self._made) < num_steps:
            self._made.append(self._reference.step(len(self._made)))
        return self._made[:num_steps]


def wide(t: Tensor) -> Tensor:
    return t.double().view(-1, 1, 1, 1, 1) / 1000


def add(found: dict[str, Any], name: str, value: float) -> None:
    found[name] = found.get(name, 0.0) + value
