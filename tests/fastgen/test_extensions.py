"""What goes beyond the published package: off by default, and right when on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen import fastgen
from megagen.fastgen import losses
from megagen.fastgen.draws import Draws
from megagen.fastgen.features import attach
from megagen.fastgen.flow_matching import add_noise, pred_x0_from_flow
from megagen.fastgen.guidance import Guidance
from megagen.fastgen.network import from_x0, to_x0
from megagen.parallel.launch import run_ranks
from tests.fastgen.networks import Case, assert_same, gradients, run

GAN = {"gan_loss_weight_gen": 0.3, "gan_r1_reg_weight": 10.0}
SEVERAL = {"student_sample_steps": 2, "sample_t_cfg": {"t_list": [0.9, 0.5, 0.0]}}


def extended(case: Case, **extensions: Any) -> Any:
    """A pipeline with some extensions, its features captured by our own hooks."""
    config = fastgen.ExtendedDMDConfig(**copy.deepcopy(case.config), extensions=extensions)
    networks = copy.deepcopy(case.networks)
    if config.gan_loss_weight_gen > 0:
        source = extensions.get("feature_source", "teacher")
        attach(networks[source], "blocks", [0, 1])
    else:
        networks.pop("discriminator")
    return fastgen.DMDPipeline(config=config, **networks)


def phases(case: Case, phase: str) -> dict[str, Any]:
    if phase == "student":
        return dict(case.data)
    return {k: v for k, v in case.data.items() if not k.startswith("negative")}


def flow_x0(network: Any, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return pred_x0_from_flow(network(x_t, t, text), x_t, t)


def pinned(case: Case) -> dict[str, Tensor]:
    return {"eps": torch.randn_like(case.data["latents"]), "timestep": torch.rand(case.batch)}


def test_off_means_the_same_numbers() -> None:
    case = Case({**GAN, "guidance_scale": 2.0})
    ours, plain = extended(case), case.pipeline(fastgen)
    for phase in ("student", "fake_score", "discriminator"):
        given = phases(case, phase)
        assert_same(run(ours, phase, 1, **given), run(plain, phase, 1, **given), 0.0)


def test_given_draws_are_used() -> None:
    case = Case({})
    pipeline, draws = case.pipeline(fastgen), pinned(case)
    text = case.data["encoder_hidden_states"]
    gen = 0.999 * case.data["noise"]
    gen = flow_x0(pipeline.student, gen, torch.full((3,), 0.999), text)
    x_t = add_noise(gen, draws["eps"], draws["timestep"])
    scores = [
        flow_x0(model, x_t, draws["timestep"], text)
        for model in (pipeline.teacher, pipeline.fake_score)
    ]
    wanted = losses.vsd_loss(gen, *scores)
    found = pipeline.compute_student_loss(**case.data, **draws)["vsd"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    wanted = ((scores[1] - gen) ** 2).mean()
    found = pipeline.compute_fake_score_loss(**phases(case, "fake_score"), **draws)["total"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("phase", ["student", "fake_score", "discriminator", "critic"])
def test_a_generator_pins_a_call(phase: str) -> None:
    simulated = {"backward_simulation": True, "student_sample_type": "sde"}
    case = Case({**GAN, **SEVERAL, **simulated})
    pipeline = extended(case)

    def call(seed: int) -> tuple[dict, dict]:
        generator = torch.Generator().manual_seed(seed)
        return run(pipeline, phase, 0, **phases(case, phase), generator=generator)

    state = torch.get_rng_state()
    first = call(5)
    torch.set_rng_state(state)
    torch.rand(7)
    assert_same(call(5), first, 0.0)
    assert any(not torch.equal(call(seed)[0]["total"], first[0]["total"]) for seed in range(3))


@pytest.mark.parametrize("source", ["teacher", "fake_score"])
def test_critics_share_one_student_forward(source: str) -> None:
    """The sum of both critics' own losses at the same draws, with fewer forwards."""
    case = Case({**GAN, "gan_use_same_t_noise": True})
    pipeline, draws = extended(case, feature_source=source), pinned(case)
    calls = []
    pipeline.student.register_forward_hook(lambda *_: calls.append(1))

    def call(phase: str) -> tuple[dict, dict]:
        return run(pipeline, phase, 4, **phases(case, phase), **draws)

    both, fake, judge = call("critic"), call("fake_score"), call("discriminator")
    assert len(calls) == 3
    total = fake[0]["total"] + judge[0]["total"]
    wanted = {"fake_score": fake[0]["fake_score"], **judge[0], "total": total}
    assert list(both[0]) == ["fake_score", "gan_disc", "r1", "total"]
    wanted = {name: wanted[name] for name in both[0]}
    assert_same(both, (wanted, {**fake[1], **judge[1]}), 1e-9)


@pytest.mark.parametrize("phase", ["student", "fake_score", "discriminator", "critic"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_in_parts_is_the_batch(phase: str, size: int) -> None:
    simulated = {"backward_simulation": True, "student_sample_type": "sde"}
    case = Case({**GAN, **SEVERAL, **simulated, "guidance_scale": 3.0})
    pipeline = extended(case)
    whole = run(pipeline, phase, 9, **phases(case, phase))
    torch.manual_seed(9)
    parts = pipeline.backward(phase, **phases(case, phase), micro_batch_size=size)
    assert_same((parts, gradients(pipeline)), whole, 1e-9)


def test_parts_are_refused_where_samples_are_coupled() -> None:
    case = Case({})
    with pytest.raises(ValueError, match="global"):
        extended(case, vsd_normalizer="global").backward("student", **case.data, micro_batch_size=1)
    with pytest.raises(ValueError, match="micro_batch_size"):
        case.pipeline(fastgen).backward("student", **case.data, micro_batch_size=0)
    with pytest.raises(ValueError, match="critics"):
        case.pipeline(fastgen).backward("critics", **case.data, micro_batch_size=1)


def test_adversarial_only_is_the_generator_term() -> None:
    """LADD: no score, no pass of the fake score, and with early exit no later block."""
    case = Case(GAN)
    plain, ladd = extended(case), extended(case, adversarial_only=True, early_exit=True)
    draws = pinned(case)
    terms = plain.compute_student_loss(**case.data, **draws)
    (0.3 * terms["gan_gen"]).backward()
    wanted = gradients(plain)
    ladd.fake_score.forward = None
    ladd.teacher.head.forward = None
    found, slopes = run(ladd, "student", 0, **case.data, **draws)
    assert list(found) == ["gan_gen", "total"]
    torch.testing.assert_close(found["total"], 0.3 * terms["gan_gen"].detach())
    assert_same(({}, slopes), ({}, wanted), 1e-9)
    critic = run(ladd, "critic", 0, **phases(case, "critic"))
    assert list(critic[0]) == ["gan_disc", "r1", "total"]


def test_features_of_the_fake_score_leave_it_alone() -> None:
    case = Case(GAN)
    pipeline = extended(case, feature_source="fake_score")
    found, slopes = run(pipeline, "student", 2, **case.data)
    assert {"vsd", "gan_gen"} <= set(found)
    assert not any(name.startswith("fake_score") for name in slopes)
    assert all(p.requires_grad for p in pipeline.fake_score.parameters())
    _, slopes = run(pipeline, "critic", 2, **phases(case, "critic"))
    separate = run(pipeline, "fake_score", 2, **phases(case, "fake_score"))[1]
    for name in separate:
        assert name in slopes  # the discriminator's loss adds nothing to the fake score


def test_an_early_exit_changes_no_number() -> None:
    case = Case(GAN)
    usual, early = extended(case), extended(case, early_exit=True)
    early.teacher.head.forward = None
    given = phases(case, "discriminator")
    assert_same(run(early, "discriminator", 1, **given), run(usual, "discriminator", 1, **given), 0)


def test_r1_at_the_noised_sample() -> None:
    case = Case({**GAN, "gan_use_same_t_noise": True})
    pipeline, draws = extended(case, r1_at="noised"), pinned(case)
    torch.manual_seed(8)
    found = pipeline.compute_discriminator_loss(**phases(case, "discriminator"), **draws)["r1"]
    torch.manual_seed(8)
    noise = torch.randn_like(case.data["latents"])
    x_t = add_noise(case.data["latents"], draws["eps"], draws["timestep"])
    logits = []
    for sample in (x_t, x_t + 0.1 * noise):
        pipeline.teacher(sample, draws["timestep"], case.data["encoder_hidden_states"])
        logits.append(pipeline.discriminator(fastgen.features.drain(pipeline.teacher)))
    torch.testing.assert_close(found, ((logits[0] - logits[1]) ** 2).mean())


@pytest.mark.parametrize("divergence", ["rkl", "js"])
def test_a_divergence_weighs_the_samples(divergence: str) -> None:
    case = Case(GAN)
    pipeline, plain, draws = extended(case, divergence=divergence), extended(case), pinned(case)
    found = pipeline.compute_student_loss(**case.data, **draws)
    usual = plain.compute_student_loss(**case.data, **draws)
    if divergence == "rkl":
        torch.testing.assert_close(found["vsd"], usual["vsd"])
    else:
        assert not torch.allclose(found["vsd"], usual["vsd"], rtol=1e-6)
    torch.testing.assert_close(found["gan_gen"], usual["gan_gen"])


def test_guidance_within_an_interval_and_rescaled() -> None:
    cond, uncond = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    t = torch.tensor([0.2, 0.8])
    full = uncond + 4 * (cond - uncond)
    found = Guidance(4.0, (0.5, 1.0)).combine(cond, uncond, t)
    torch.testing.assert_close(found, torch.stack([cond[0], full[1]]))
    ratio = torch.stack([cond[i].std() / full[i].std() for i in range(2)]).view(2, 1, 1, 1)
    found = Guidance(4.0, rescale=0.7).combine(cond, uncond, t)
    torch.testing.assert_close(found, 0.7 * full * ratio + 0.3 * full)
    assert not Guidance(4.0, (0.5, 0.7)).wanted(t)


def test_no_unconditional_pass_outside_the_interval() -> None:
    case = Case({"guidance_scale": 3.0})
    pipeline = extended(case, guidance_interval=(0.4, 0.6))
    calls: list[int] = []
    pipeline.teacher.register_forward_hook(lambda *_: calls.append(1))
    pipeline.compute_student_loss(**case.data, timestep=torch.tensor([0.1, 0.2, 0.9]))
    assert len(calls) == 1
    pipeline.compute_student_loss(**case.data, timestep=torch.tensor([0.1, 0.5, 0.9]))
    assert len(calls) == 3


def test_v_with_its_own_meaning() -> None:
    x0, eps = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    t = torch.tensor([0.1, 0.5, 0.95]).double()
    x_t, time = add_noise(x0, eps, t), t.view(3, 1, 1)
    v = (1 - time) * eps - time * x0
    torch.testing.assert_close(to_x0(v, x_t, t, "v", consistent=True), x0)
    torch.testing.assert_close(from_x0(x0, x_t, t, "v", consistent=True), v)
    torch.testing.assert_close(to_x0(eps - x0, x_t, t, "v", consistent=False), x0)
    for call in (to_x0, from_x0):
        with pytest.raises(ValueError, match="speed"):
            call(x0, x_t, t, "speed", consistent=True)


def test_exact_timesteps_stay_float32() -> None:
    case = Case({"num_train_timesteps": 1000}, dtype=torch.bfloat16)
    for exact, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        pipeline, seen = extended(case, exact_timesteps=exact), []
        pipeline.teacher.register_forward_pre_hook(
            lambda _m, _a, given, seen=seen: seen.append(given["timestep"]), with_kwargs=True
        )
        pipeline.compute_student_loss(**case.data, timestep=torch.tensor([0.833] * 3))
        assert seen[0].dtype == dtype
        assert float(seen[0][0]) == pytest.approx(833 if exact else 832)


def test_fp32_losses_keep_one_latent_sized_tensor() -> None:
    gen, teacher, fake = (torch.randn(2, 16, 8, 8).bfloat16() for _ in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = losses.vsd_loss(gen.requires_grad_(), teacher, fake, fp32=True)
    assert loss.dtype == torch.float32
    assert [x.shape for x in saved] == [gen.shape]
    assert saved[0].dtype == torch.float32


@pytest.mark.parametrize("sample_type", ["ode", "sde"])
def test_sampling_takes_the_students_steps(sample_type: str) -> None:
    case = Case({**SEVERAL, "student_sample_type": sample_type})
    pipeline = case.pipeline(fastgen)
    noise, text = case.data["noise"], case.data["encoder_hidden_states"]
    found = pipeline.sample(noise, text, generator=torch.Generator().manual_seed(3))
    times = [torch.full((3,), t) for t in (0.9, 0.5)]
    x_t = 0.9 * noise
    x0 = flow_x0(pipeline.student, x_t, times[0], text)
    fresh = torch.empty_like(noise).normal_(generator=torch.Generator().manual_seed(3))
    implied = (x_t - 0.1 * x0) / 0.9
    x_t = 0.5 * x0 + 0.5 * (implied if sample_type == "ode" else fresh)
    wanted = flow_x0(pipeline.student, x_t, times[1], text)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not found.requires_grad
    one = pipeline.sample(noise, text, model=pipeline.teacher, t_list=[1.0, 0.0])
    torch.testing.assert_close(one, flow_x0(pipeline.teacher, noise, torch.ones(3), text))
    with pytest.raises(ValueError, match="t_list"):
        pipeline.sample(noise, text, t_list=[1.0])


def test_ranks_of_a_model_parallel_group_draw_alike() -> None:
    found = run_ranks(4, draw_on_rank)
    first, second = found[:2], found[2:]
    assert first[0] == first[1] and second[0] == second[1]
    assert first[0][:2] != second[0][:2]  # other samples
    assert len({rung for *_, rung in found}) == 1


def draw_on_rank() -> tuple[list, list, int]:
    """Groups {0, 1} and {2, 3}; each rank starts from other numbers."""
    import torch.distributed as dist

    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    draws = Draws(torch.Generator().manual_seed(rank), groups[rank // 2])
    normal = draws.normal(torch.zeros(2, 3))
    pipeline = Case({}).pipeline(fastgen)
    times = pipeline._draw_timesteps(draws, 4, torch.device("cpu"))
    return normal.tolist(), times.tolist(), draws.rung(1000, torch.device("cpu"))


def test_a_divergence_is_normalised_over_all_ranks() -> None:
    """With one sample a rank, a mean of the rank's own would leave every weight at 1."""
    case = Case({"gan_loss_weight_gen": 0.3}, batch=2)
    draws = {**pinned(case), **case.data}
    whole = extended(case, divergence="kl").compute_student_loss(**draws)["vsd"].detach()
    found = run_ranks(2, divergence_on_rank, case, draws)
    assert sum(found) / 2 == pytest.approx(float(whole), rel=1e-6)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def divergence_on_rank(case: Case, draws: dict[str, Tensor]) -> float:
    import torch.distributed as dist

    own = {name: value[dist.get_rank()][None] for name, value in draws.items()}
    return float(extended(case, divergence="kl").compute_student_loss(**own)["vsd"].detach())


def test_features_of_a_fake_score_that_ddp_wraps() -> None:
    run_ranks(1, through_ddp, Case(GAN))


def through_ddp(case: Case) -> None:
    """The student's step asks its parameters for nothing, and the reducer does not wait for it."""
    from torch.nn.parallel import DistributedDataParallel

    plain, wrapped = (extended(case, feature_source="fake_score") for _ in range(2))
    wrapped.fake_score = DistributedDataParallel(wrapped.fake_score)
    for phase in ("student", "student", "critic", "student"):
        given = phases(case, phase)
        found = [run(pipeline, phase, 6, **given) for pipeline in (plain, wrapped)]
        found[1] = (found[1][0], {k.replace(".module", ""): v for k, v in found[1][1].items()})
        assert_same(found[1], found[0], 1e-9)


def test_a_copied_fake_score_gives_its_features_to_both_critics() -> None:
    """``create_fake_score`` after attaching: the copy's hooks wait until they are asked."""
    case = Case({**GAN, "gan_use_same_t_noise": True})
    attach(case.networks["teacher"], "blocks", [0, 1])
    fake_score = fastgen.create_fake_score(case.networks["teacher"])
    config = fastgen.ExtendedDMDConfig(**case.config, extensions={"feature_source": "fake_score"})
    pipeline = fastgen.DMDPipeline(config=config, **{**case.networks, "fake_score": fake_score})
    draws, given = pinned(case), phases(case, "critic")
    critic = run(pipeline, "critic", 3, **given, **draws)[0]
    judge = run(pipeline, "discriminator", 3, **given, **draws)[0]
    torch.testing.assert_close(critic["gan_disc"], judge["gan_disc"])


def test_sampling_leaves_no_features_behind() -> None:
    pipeline = Case(GAN).pipeline(fastgen)
    noise = torch.randn(1, 4, 2, 4, 3, dtype=torch.float64)
    pipeline.sample(noise, model=pipeline.teacher)
    assert pipeline.teacher._fastgen_captured == []


def test_no_guidance_where_no_score_is_matched() -> None:
    """LADD has no use for the unconditional pass, and asks for no negative prompt."""
    case = Case({**GAN, "guidance_scale": 4.0})
    pipeline, calls = extended(case, adversarial_only=True), []
    pipeline.teacher.register_forward_hook(lambda *_: calls.append(1))
    case.data.pop("negative_encoder_hidden_states")
    pipeline.compute_student_loss(**case.data)
    assert len(calls) == 1


def test_lists_are_cut_into_parts_as_tensors_are() -> None:
    case, seen = Case({}), []
    pipeline = case.pipeline(fastgen)
    usual = pipeline._call_model

    def call(*args: Any, lengths: list[int], whole: tuple[int, ...], **given: Any) -> Tensor:
        seen.append((len(args[1]), lengths, whole))
        return usual(*args, **given)

    pipeline._call_model = call
    more = {"lengths": [4, 5, 6], "whole": (1, 2, 3)}
    pipeline.backward("fake_score", **phases(case, "fake_score"), micro_batch_size=2, **more)
    assert seen[0] == (2, [4, 5], (1, 2, 3)) and seen[-1] == (1, [6], (1, 2, 3))
