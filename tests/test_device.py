"""The code on tensors of a pretended second device: what would mix devices on a GPU, or meet its
slow attention kernel, fails here on any machine, and the results are the CPU's. tests/gpu.py, in
small, is tried here too."""

import argparse
import copy
import json
from collections.abc import Iterator

import gpu as gpu_script
import pytest
import torch
from test_model import FakeGraph
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import caopd
import data
import optim
from model import Config, Transformer

# --------------------------------------------------------------------------- the pretended device

GPU = torch.device("cuda:0")
COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
READS = {"item", "tolist", "__bool__", "__int__", "__float__"}  # These bring a number to the host.


class Refused(Exception):
    """What a GPU would refuse, or serve with a kernel whose memory is quadratic."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU, and has its numbers in a tensor of the host, `held`."""

    device = GPU

    @staticmethod
    def __new__(cls, held: Tensor):
        # To torch's own code it is a tensor without memory, whose operations are left to us.
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta")

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return operate(operation, args, kwargs or {})


def operate(operation, args: tuple, kwargs: dict):
    """Runs an operation with OnGPU tensors among its inputs on what they hold."""
    # Autograd makes zeros where our tensors seem to be, on "meta".
    args, kwargs = tree_map(
        lambda x: sent(torch.zeros(x.shape, dtype=x.dtype)) if isinstance(x, Tensor) and x.is_meta
        and not isinstance(x, OnGPU) else x, (args, kwargs))
    inputs = tree_leaves((args, kwargs))
    for x in inputs:
        host = isinstance(x, Tensor) and not isinstance(x, OnGPU)
        if host and x.dim() > 0 and operation not in COPIES:
            raise Refused(f"{operation}: a tensor of the host among those of the GPU")
    known = {id(x.held): x for x in inputs if isinstance(x, OnGPU)}
    stays = str(kwargs.get("device") or GPU) != "cpu"
    if "device" in kwargs:
        kwargs = kwargs | {"device": "cpu"}
    out = operation(*tree_map(held, args), **tree_map(held, kwargs))
    if operation is torch.ops.aten.copy_.default:
        return inputs[0]  # It may be the host's.

    def placed(x):
        return known.get(id(x), None if x is None else sent(x) if stays else x)
    return tree_map(lambda x: placed(x) if isinstance(x, Tensor) else x, out)


def held(x):
    return x.held if isinstance(x, OnGPU) else x


def sent(x: Tensor) -> OnGPU:
    return OnGPU(x.detach())


class DeviceGenerator(torch.Generator):
    """A generator of the host that knows for which device it was asked."""

    def __new__(cls, device: torch.device | str):
        made = super().__new__(cls)
        made.place = str(device)
        return made


class Pretended(TorchFunctionMode):
    """Serves `device=` on this device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in READS:
            return function(*tree_map(held, args), **kwargs)
        if name == "__getitem__" and isinstance(args[1], list) or name == "where":
            # torch itself sends these lists and numbers to the device.
            args = args[0], *(x if isinstance(x, Tensor) else sent(torch.tensor(x))
                              for x in args[1:])
        inputs = tree_leaves((args, kwargs))
        here = any(isinstance(x, OnGPU) for x in inputs)
        device = next((x for x in inputs if isinstance(x, torch.device)), None)
        generator, place = kwargs.get("generator"), GPU if device is None and here else device
        if generator is not None and generator.place != str(place):
            raise Refused(f"{name}: a generator of {generator.place} for a tensor of {place}")
        if name == "to" and device == GPU and here:
            return args[0]
        if device is None or here:
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda x: torch.device("cpu") if x is device else x, (args, kwargs))
        out = function(*args, **kwargs)
        return sent(out) if device == GPU else out


def fused_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """As a GPU has it: no fused kernel shares heads in float32, or under a mask."""
    share = q.shape[1] // k.shape[1]
    if q.device == GPU and share > 1 and (q.dtype == torch.float32 or attn_mask is not None):
        raise Refused("attention would fall to the kernel that writes all scores down")
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, -torch.inf)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v


@pytest.fixture
def gpu(monkeypatch) -> Iterator[None]:
    """Inside, device="cuda:0" works, with generators and (imitated) CUDA graphs of its own."""
    monkeypatch.setattr(torch, "Generator", DeviceGenerator)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side stream")
    monkeypatch.setattr("model.RecordedStep", FakeGraph)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    with Pretended():
        yield


def on_gpu(network: Transformer) -> Transformer:
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            moved = torch.nn.Parameter(sent(weight), requires_grad=weight.requires_grad)
            setattr(module, name, moved)
    return network


# ------------------------------------------------------------------------------------- what runs

def small(kind: dict, dtype: torch.dtype) -> Transformer:
    tokens = data.toy_tokenizer().backend.get_vocab_size()
    torch.manual_seed(0)
    return Transformer(Config(**dict(
        vocab_size=tokens, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=1) | kind)).to(dtype)


def everything(student: Transformer, teacher_device: str) -> dict:
    """One step of CaOPD and an evaluation; returns what they computed, on the host."""
    tokenizer, task = data.toy_tokenizer(), data.arithmetic_task(0, 4, words=False)
    sampling = caopd.Sampling(max_new_tokens=6)
    teacher = caopd.make_teacher(student, teacher_device)
    optimizer = caopd.AdamW(student, weight_decay=0.1, clip=1.0)
    generator = caopd.seeded(0, "rollout", 0, student.device)
    groups = caopd.rollout(student, tokenizer, task.draw(3, "distill", 0), task.wording, 3,
                           sampling, generator)
    targets = [target for group in groups for target in caopd.make_targets(
        group, caopd.mu_hat(group), [0.0] * 3, tokenizer, task.wording, "demo")]
    losses = caopd.accumulate_gradient(student, teacher, targets, caopd.kl,
                                       caopd.target_cross_entropy, skip_tokens=0, scale=0.1)
    norm = optimizer.step(0, 1e-2, caopd.seeded(0, "rounding", 0, student.device))
    caopd.ema_update(teacher, student, 0.5, caopd.seeded(0, "ema", 0, student.device))
    figures, _ = caopd.evaluate(student, tokenizer, task.held_out, task.wording, sampling, seed=0,
                                samples=2, oracle_samples=2, paper_samples=2)
    weights = [weight.cpu().float() for weight in (*student.parameters(), *teacher.parameters())]
    return {"rollouts": [rollout.ids for group in groups for rollout in group.rollouts],
            "losses": losses, "norm": norm, "weights": torch.cat([w.flatten() for w in weights]),
            "truncated": figures["truncated"]}


WINDOWS = dict(model_type="olmo3", sliding_window=3,
               layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize("kind, dtype, teacher_device, recompute, rank", [
    (dict(model_type="qwen3"), torch.float32, "same", False, 0),
    (dict(model_type="qwen2", tie_word_embeddings=True), torch.float32, "cpu", True, 0),
    (dict(model_type="qwen2"), torch.float32, "same", True, 2),
    (WINDOWS, torch.float32, "same", True, 0),
    (WINDOWS, torch.bfloat16, "same", False, 0),
    (dict(model_type="llama"), torch.bfloat16, "cpu", False, 0)], ids=str)
def test_a_step_and_an_evaluation_never_mix_devices(request, kind, dtype, teacher_device,
                                                    recompute, rank):
    network = small(kind, dtype)
    if rank:
        gpu_script.adapted(network, rank)
    expected = everything(copy.deepcopy(network), teacher_device)
    network.recompute = recompute
    request.getfixturevalue("gpu")
    found = everything(on_gpu(network), teacher_device)
    exact = dtype == torch.float32  # Stochastic rounding doubles the smallest of differences.
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4 if exact else 0.1)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4 if exact else 0.1)
    apart = (found["weights"] - expected["weights"]).abs()
    assert apart.max() < 0.05
    if exact:  # AdamW's first step divides by the gradient's size, be it a rounding error's.
        assert (apart > 1e-4).float().mean() < 1e-3
        assert found["rollouts"] == expected["rollouts"]


@pytest.mark.parametrize("work", [
    lambda x, host, generator: x + host,
    lambda x, host, generator: x[host > 0],
    lambda x, host, generator: torch.rand(3, device=GPU, generator=generator),
    lambda x, host, generator: torch.rand_like(x, generator=generator),
    lambda x, host, generator: x.index_copy_(0, host.long(), x)])
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu, work):
    host = torch.arange(3.0)
    x = host.to(GPU)
    assert x.device == GPU and (x * 2 + 1).tolist() == [1, 3, 5] and x.cpu().device.type == "cpu"
    assert torch.rand(3, device=GPU, generator=torch.Generator(GPU)).device == GPU
    with pytest.raises(Refused):
        work(x, host, torch.Generator("cpu"))


# ------------------------------------------------------------------------------------ tests/gpu.py

FLAGS = argparse.Namespace(device="cpu", model="")


@pytest.mark.parametrize("part", ["gradients", "bfloat16", "rounding", "gradients-lora",
                                  "bfloat16-lora", "sampler-lora"])
def test_parts_of_the_gpu_script_work_in_small(part):
    result = gpu_script.outcome(part, FLAGS)
    assert result["status"] == "ok" and result["figures"], result["reason"]


def test_a_part_of_the_gpu_script_that_fails_hides_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optim, "round_stochastically", lambda x, generator: torch.zeros_like(x))
    monkeypatch.setattr(gpu_script, "apart", gpu_script.outcome)
    report = tmp_path / "gpu.json"
    assert gpu_script.main(["--device", "cpu", "--json", str(report),
                            "--parts", "rounding,8B,gradients"]) == 1
    parts = json.loads(report.read_text())["parts"]
    assert [part["status"] for part in parts] == ["failed", "left out", "ok"]
    assert "values go to their neighbours" in capsys.readouterr().out
