"""The work of the GPU benchmark: models, random tokens, FLOPs, and the timed loop. Shared with the peers' runners.

A step is forward, backward, clipping at 1.0, AdamW and zero_grad. Tokens are random, drawn alike by whoever
runs the work.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

AUX_LOSS = 0.01
LEARNING = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
MAX_NORM = 1.0


@dataclass(frozen=True)
class Work:
    """Sizes of a decoder whose every feed-forward part is a mixture (`experts` 0: a dense one of width ffn)."""

    layers: int = 8
    hidden: int = 2048
    ffn: int = 4096
    experts: int = 8
    top_k: int = 2
    heads: int = 16
    kv_heads: int = 4
    sequence: int = 4096
    sequences: int = 2  # per data rank
    vocab: int = 32000

    def flops(self) -> float:
        """Of forward and backward, per token: 6 per weight that the token meets, attention's two products
        over the half of the pairs that the causal mask leaves."""
        h, d = self.hidden, self.hidden // self.heads
        attention = 2 * h * h + 2 * h * d * self.kv_heads
        feed = 3 * h * self.ffn * max(self.top_k, 1) + h * self.experts
        scores = 2 * self.sequence * h / 2
        return 6 * (self.layers * (attention + feed + scores) + h * self.vocab)

    def config(self):
        """The Hugging Face config: Mixtral, or Mistral without experts."""
        import transformers

        kwargs: dict = dict(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.sequence,
            use_cache=False,
            tie_word_embeddings=False,
            sliding_window=None,
        )
        if not self.experts:
            return transformers.MistralConfig(**kwargs)
        return transformers.MixtralConfig(
            **kwargs,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            output_router_logits=True,
            router_aux_loss_coef=AUX_LOSS,
        )

    def model(self, device: torch.device, dtype: torch.dtype, seed: int = 1234, **kwargs):
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(seed)
        made = transformers.MixtralForCausalLM if self.experts else transformers.MistralForCausalLM
        with device:
            return made._from_config(self.config(), dtype=dtype, **kwargs).train()


WORKS = {
    "mixtral": Work(),
    "fine": Work(experts=64, ffn=1024, top_k=8),
    "dense": Work(experts=0, ffn=2 * 4096, top_k=1),  # of mixtral's active FLOPs
    "dense-fine": Work(experts=0, ffn=8 * 1024, top_k=1),
}


def add_work(parser) -> None:
    parser.add_argument("--work", choices=WORKS, default="mixtral")
    for name in Work.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the work's")
    parser.add_argument("--steps", type=int, default=8, help="timed")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--fixed-batch", action="store_true", help="the same tokens in each step")


def work_of(args) -> Work:
    given = {name: getattr(args, name) for name in Work.__dataclass_fields__}
    return replace(WORKS[args.work], **{name: value for name, value in given.items() if value is not None})


def start() -> torch.device:
    """This process's device, with the process group made: NCCL, or gloo without GPUs."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1").items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wait = timedelta(seconds=240)
    if cuda:
        dist.init_process_group("nccl", timeout=wait, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=wait)
    return device


def batches(work: Work, device: torch.device, replica: int, fixed: bool = False, seed: int = 1234):
    """Endless token ids [sequences, sequence], the same on every rank of one data-parallel replica."""
    generator = torch.Generator().manual_seed(seed + 7919 * replica)
    shape = (work.sequences, work.sequence)
    first = torch.randint(0, work.vocab, shape, generator=generator)
    yield first.to(device)
    while True:
        ids = first if fixed else torch.randint(0, work.vocab, shape, generator=generator)
        yield ids.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a bfloat16 product of two random square matrices, here and now."""
    if device.type != "cuda":
        size = 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    for _ in range(3):
        a @ b
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def timed(args, work: Work, device, step, data, replicas: int, **said) -> dict:
    """Run `step(ids) -> loss` warmup + steps times; what a run says, on every rank. A step is as long as its
    slowest rank. losses: mean over the ranks, of every step."""
    times, losses = [], []
    began = time.perf_counter()
    for i in range(args.warmup + args.steps):
        ids = next(data)
        if i == args.warmup:
            # What compilation left behind is millions of objects, through which the collector would go again
            # and again in the middle of steps; training scripts for large models all do this or the like.
            gc.collect()
            gc.freeze()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        loss = step(ids)
        synchronize(device)
        seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        mean = loss.detach().float().reshape(1).clone()
        dist.all_reduce(mean)
        losses.append(round(mean.item() / dist.get_world_size(), 5))
        if i == 0:
            said["first_step_s"] = round(time.perf_counter() - began, 1)
        if i >= args.warmup:
            times.append(seconds.item())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    most = torch.tensor([float(peak)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    median, tokens = statistics.median(times), work.sequences * work.sequence * replicas
    rate, world = gemm_rate(device), dist.get_world_size()
    flops = work.flops() * tokens / median / world
    return dict(
        tokens_per_s=round(tokens / median),
        step_ms=round(median * 1e3, 2),
        steps_ms=[round(t * 1e3, 2) for t in times],
        peak_gib=round(most.item() / 2**30, 2),
        tflops=round(flops / 1e12, 1),
        of_gemm_rate=round(flops / rate, 3),
        gemm_tflops=round(rate / 1e12, 1),
        losses=losses,
        work=args.work,
        world=world,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        **said,
    )


def say(row: dict) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
