"""Pretrain an unmodified Hugging Face MoE, byte by byte, on source text that every Python has.

    torchrun --standalone --nproc-per-node 4 examples/pretrain.py            # ep=2, tp=2 on this machine
    torchrun --standalone --nproc-per-node 8 examples/pretrain.py --mesh dp=2,ep=2,tp=2
    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --mesh dp=2,tp=2 --roles expert=tp
    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --model-type qwen3_moe \\
        --set num_hidden_layers=4
    torchrun --standalone --nproc-per-node 4 examples/pretrain.py --precision bf16
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 examples/pretrain.py \\
        --save-every 50 --resume auto                                        # goes on when a rank dies
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/pretrain.py --mesh dp=4,ep=2,tp=2

The text is the `.py` files of the standard library, shuffled by file; the first of them are held out. The
ranks run on CUDA when this machine has a GPU for each of them, else on the CPU. Written to --out: log.jsonl
and loss.png. With --save-every there are checkpoints; --resume goes on from one, on the same mesh or another,
with the same batches and the same losses.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import logging
import math
import os
import random
import signal
import sys
import sysconfig
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import tedfx
from tedfx import Options
from tedfx.errors import ConfigError
from tedfx.placement.roles import MeshShape, Roles
from tedfx.trace.precision import cast_model

BYTES = 256
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}  # of the check of the first step, by precision

# The default sizes, for every model type whose config knows the name.
SMALL = dict(
    vocab_size=BYTES,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=4096,
    num_local_experts=8,
    num_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=512,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    initializer_range=0.05,
    output_router_logits=True,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def parse_args(argv=None) -> argparse.Namespace:
    about, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description=about,
        epilog="examples:\n" + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-type",
        default="mixtral",
        metavar="TYPE",
        help="a causal language model of transformers, by its model type: mixtral, qwen3_moe, olmoe, "
        "gpt_oss, llama, .. (default: mixtral)",
    )
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="sizes and switches of its config, e.g. --set hidden_size=256 num_hidden_layers=4 "
        "output_router_logits=False",
    )

    group = parser.add_argument_group("parallelism")
    group.add_argument(
        "--mesh",
        default="ep=2,tp=2",
        metavar="AXIS=SIZE,..",
        help="axes of the device mesh, outermost first, out of dp, ep and tp; sizes multiply to the number "
        "of ranks (default: ep=2,tp=2)",
    )
    group.add_argument(
        "--roles",
        nargs="+",
        action="extend",
        default=[],
        metavar="ROLE=AXIS,..",
        help="which axes do what, where it is not the default; expert=tp splits experts over the tensor axis "
        "(PPMoE), "
        "expert=ep,tp folds both, expert_tensor= leaves each expert whole",
    )
    Options.add_arguments(group, only={*Options.names()} - {"outputs"})  # validation reads the logits

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=150, metavar="N", help="optimizer steps (default: 150)")
    group.add_argument(
        "--sequence-length", type=int, default=128, metavar="N", help="bytes per sequence (default: 128)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="sequences per step over all ranks (default: 16)",
    )
    group.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="run a step's sequences in N parts and add their gradients up, one reduction per step (default: "
        "1)",
    )
    group.add_argument(
        "--layered",
        action="store_true",
        help="run the micro-batches layer by layer: parameters are gathered and gradients summed once per "
        "layer, more activations are kept",
    )
    group.add_argument(
        "--lr",
        type=float,
        default=2e-3,
        metavar="X",
        help="peak learning rate of AdamW: linear warm-up, then cosine to a tenth (default: 2e-3)",
    )
    group.add_argument("--warmup", type=int, default=20, metavar="N", help="steps of warm-up (default: 20)")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the weights, the split of the files and the batches (default: 0)",
    )

    group = parser.add_argument_group("saving")
    group.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="steps between checkpoints, written while training goes on, and at the end (default: none)",
    )
    group.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="where they go, a folder that all hosts see (default: OUT/checkpoints)",
    )
    group.add_argument(
        "--resume",
        default="no",
        metavar="WHAT",
        help="auto: go on from the latest whole checkpoint, if there is one; older: where the latest is "
        "damaged, from the newest whole one; or the path of one (default: no)",
    )

    group.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="a new folder, which from_pretrained reads, for the weights at the end (default: none)",
    )

    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long ranks wait in a collective for one that does not come, before all end with a line "
        "(default: 90; 600 with --compile, which takes long and not alike)",
    )

    group = parser.add_argument_group("looking")
    group.add_argument(
        "--eval-every",
        type=int,
        default=50,
        metavar="N",
        help="steps between validations; there is one at the end too (default: 50)",
    )
    group.add_argument(
        "--eval-sequences",
        type=int,
        default=256,
        metavar="N",
        help="held-out sequences per validation, rounded up to whole batches (default: 256)",
    )
    group.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare loss and gradients of the first step with the plain model on one device (of which "
        "--capacity local is another function); exit 1 where "
        "they differ by more than "
        f"{', '.join(f'{bound:g} in {name}' for name, bound in TOLERANCE.items())}",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=Path("out/pretrain"),
        metavar="DIR",
        help="where log.jsonl and loss.png go (default: out/pretrain)",
    )
    args = parser.parse_args(argv)
    for name in ("steps", "sequence_length", "batch_size", "micro_batches", "eval_every", "eval_sequences"):
        if getattr(args, name) < (2 if name == "sequence_length" else 1):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    if args.save_every < 0:
        parser.error(f"--save-every {args.save_every} is too small")
    args.checkpoint_dir = args.checkpoint_dir or args.out / "checkpoints"
    return args


# ---- data --------------------------------------------------------------------------------------------------


def read_corpus(seed: int, held_out: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, validation) bytes of the standard library's source, split by file.

    Left out: tests, installed packages, and `encodings` (tables that a program wrote).
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
    files = sorted(
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if not skip & set(p.relative_to(root).parts)
    )
    random.Random(seed).shuffle(files)
    texts = [(root / name).read_bytes() for name in files]
    size, first, held = held_out * sum(map(len, texts)), 0, 0
    while held < size:
        held, first = held + len(texts[first]), first + 1
    pieces = b"".join(texts[first:]), b"".join(texts[:first])
    return tuple(torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in pieces)


def bigram(training: torch.Tensor, validation: torch.Tensor) -> tuple[float, float]:
    """Nats per byte: the entropy of a byte given the one before it, and that table's (smoothed) cross-entropy
    on held-out text."""
    pairs = training[:-1].long() * BYTES + training[1:].long()
    counts = torch.bincount(pairs, minlength=BYTES * BYTES).view(BYTES, BYTES).double()
    joint = counts / counts.sum()
    given = (counts / counts.sum(1, keepdim=True)).clamp(min=1e-300).log().nan_to_num()
    smooth = ((counts + 0.1) / (counts.sum(1, keepdim=True) + 0.1 * BYTES)).log()
    return -(joint * given).sum().item(), -smooth[validation[:-1].long(), validation[1:].long()].mean().item()


def windows(text: torch.Tensor, starts: torch.Tensor, length: int, device) -> torch.Tensor:
    return torch.stack([text[i : i + length] for i in starts.tolist()]).long().to(device)


# ---- set-up ------------------------------------------------------------------------------------------------


def make_model(model_type: str, settings: list[str]) -> torch.nn.Module:
    """The library's own class with random weights: `SMALL` where the config knows the name, then the user's
    settings."""
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ConfigError(
            f"--model-type {model_type}: transformers has no such model type; e.g. mixtral, qwen3_moe, "
            "gpt_oss"
        ) from None
    name = lambda key: known.attribute_map.get(key, key)  # configs may know one entry by two names
    chosen = {name(key): value for key, value in SMALL.items() if hasattr(known, key)}
    if hasattr(
        known, "qk_rope_head_dim"
    ):  # latent attention: the part that rotates is the head, and heads share nothing
        chosen.update(head_dim=SMALL["qk_rope_head_dim"], num_key_value_heads=SMALL["num_attention_heads"])
    for word in settings:
        key, equals, text = word.partition("=")
        if not equals or not hasattr(known, key):
            raise ConfigError(f"--set {word}: expected KEY=VALUE with a key of the {model_type} config")
        try:
            chosen[name(key)] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            chosen[name(key)] = text
    if chosen.get("vocab_size") != BYTES:
        raise ConfigError(
            f"vocab_size={chosen.get('vocab_size')}: the text is bytes, so the vocabulary is {BYTES}"
        )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **chosen))


def meet(backend: str, timeout: timedelta) -> None:
    """init_process_group, also after a restart: torchrun's store outlives the ranks, and the addresses that
    the dead ones left in it must not be read (pytorch#135712). On one host the number of the restart keeps
    them apart; several hosts count by themselves, there each start needs its own store.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["TORCHELASTIC_MAX_RESTARTS"] == "0":
        dist.init_process_group(backend, timeout=timeout)
        return
    if env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:
        raise ConfigError(
            "--max-restarts on several hosts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, "
            "else restarted ranks read the addresses of the dead ones"
        )
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"restart-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]), timeout=timeout
    )


def make_mesh(args: argparse.Namespace, options: Options):
    """(device mesh, roles), every mistake found before the first collective."""
    if "RANK" not in os.environ:
        raise ConfigError(
            "run this with torchrun: torchrun --standalone --nproc-per-node 4 examples/pretrain.py "
            "(--help lists the options)"
        )
    shape, world, local = (
        MeshShape.of(args.mesh),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    if shape.world != world:
        raise ConfigError(
            f"--mesh {args.mesh} is {shape.world} ranks, torchrun started {world}: change --mesh or "
            "--nproc-per-node"
        )
    given = {}
    for word in args.roles:
        role, equals, axes = word.partition("=")
        if not equals:
            raise ConfigError(f"--roles {word}: expected ROLE=AXIS,.. such as expert=tp")
        given[role] = tuple(axis for axis in axes.split(",") if axis)
    roles = Roles.resolve(shape, given)
    shares = shape.size(roles.batch)
    if args.batch_size % shares:
        fits = [
            n for n in (args.batch_size // shares * shares, (args.batch_size // shares + 1) * shares) if n
        ]
        raise ConfigError(
            f"--batch-size {args.batch_size} does not split over the {shares} ranks of the batch axes "
            f"({', '.join(roles.batch)}): "
            f"use {' or '.join(map(str, fits))}"
        )
    if args.batch_size // shares % args.micro_batches:
        raise ConfigError(
            f"--micro-batches {args.micro_batches} does not split the {args.batch_size // shares} "
            "sequences of a rank: use a divisor of them"
        )
    kind = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    meet(
        "nccl" if kind == "cuda" else "gloo",
        timedelta(seconds=args.timeout or (600 if options.compile else 90)),
    )
    return init_device_mesh(kind, shape.sizes, mesh_dim_names=shape.names), given


def backward(pm, parts, layered: bool, scale) -> torch.Tensor:
    """Forward and backward of a step's micro-batches, of equally many tokens each; the mean loss of the
    global batch. Gradients are summed over ranks once."""
    if layered:
        loss = sum(
            out.loss for out in pm.layered([{"input_ids": ids, "labels": ids} for ids in parts])
        ) / len(parts)
        scale(loss).backward()
        return loss.detach()
    total = 0.0
    for i, ids in enumerate(parts):
        with pm.no_sync() if i + 1 < len(parts) else nullcontext():
            loss = pm(input_ids=ids, labels=ids).loss / len(parts)
            scale(loss).backward()
        total = total + loss.detach()
    return total


# ---- the check against the single device -------------------------------------------------------------------


def check_first_step(
    model,
    loss: torch.Tensor,
    gradients: dict[str, torch.Tensor],
    batches: list[torch.Tensor],
    precision: str,
    scale: float,
) -> bool:
    """Run the plain model, its parameters cast alike, on the whole global batch, on this one device, and
    print how far the parallel step is from it."""
    cast_model(model, precision).to(batches[0].device).zero_grad()
    wanted_loss = 0.0
    for batch in batches:
        part = model(input_ids=batch, labels=batch).loss.float() / len(batches)
        (part * scale).backward()
        wanted_loss = wanted_loss + part.detach()
    wanted = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    norm = lambda tensors: math.sqrt(sum(t.double().pow(2).sum().item() for t in tensors))
    total = norm(wanted.values())
    found = norm(gradients[name] for name in wanted)
    apart = {
        name: norm([gradients[name].double() - g]) / max(norm([g]), 1e-6 * total)
        for name, g in wanted.items()
    }
    worst = max(apart, key=apart.get)
    rows = [
        ("loss", wanted_loss.item(), loss.item(), abs(loss.item() / wanted_loss.item() - 1)),
        ("gradient norm", total, found, abs(found / total - 1)),
    ]
    print(
        "First step against the single device "
        f"({precision}{f', gradients of the loss times {scale:g}' if scale != 1 else ''}, tolerance "
        f"{TOLERANCE[precision]:g}):"
    )
    for what, one, many, difference in rows:
        print(f"  {what:14} {one:<12.7g} {many:<12.7g} relative difference {difference:.1e}")
    print(f"  worst parameter gradient {worst}: relative difference {apart[worst]:.1e}", flush=True)
    return all(difference <= TOLERANCE[precision] for *_, difference in rows)


# ---- stopping ----------------------------------------------------------------------------------------------


class Stop:
    """SIGTERM, as a scheduler sends it before it takes the machine: noted when it comes, acted on between two
    steps, by all ranks together."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_) -> None:
        self.asked = True

    def agreed(self, device: str) -> bool:
        """Whether any rank was asked to stop. One number over all ranks."""
        asked = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())


# ---- training ----------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    # Step 1: mesh, data, model.
    options = Options.from_arguments(args)
    precision = options.precision or "fp32"  # the config's own dtype
    stop = Stop()
    mesh, roles = make_mesh(args, options)
    rank, device = dist.get_rank(), mesh.device_type
    # clip_grad_norm_ sums one number over each mesh axis in turn; DTensor would say on every rank that it
    # could be one sum.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    say = print if rank == 0 else (lambda *a, **k: None)
    training, validation = read_corpus(args.seed)
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(training.numpy().tobytes()).hexdigest())
    if len(set(digests)) > 1:
        raise ConfigError(
            "the hosts have different standard libraries, so different text: use the same Python on all "
            "of them"
        )
    if len(validation) <= args.sequence_length:
        raise ConfigError(
            f"--sequence-length {args.sequence_length} is longer than the held-out text, "
            f"{len(validation)} bytes"
        )
    torch.manual_seed(args.seed)
    model = make_model(args.model_type, args.set).train()
    weights = sum(p.numel() for p in model.parameters())
    say(
        f"{type(model).__name__}, {weights / 1e6:.1f} million parameters, on {args.mesh} ({device}); "
        f"{len(training) / 1e6:.1f} MB of text, {len(validation) / 1e6:.2f} MB held out"
    )

    # Step 2: the module of this rank. From here on it is an ordinary training loop.
    start = time.perf_counter()
    rows = args.batch_size // MeshShape.of(args.mesh).size(
        Roles.resolve(MeshShape.of(args.mesh), roles).batch
    )
    example = torch.zeros(rows, args.sequence_length, dtype=torch.int64)
    pm = tedfx.parallelize(
        model,
        mesh,
        roles=roles,
        example_inputs={"input_ids": example, "labels": example},
        options=options,
    )
    say(f"parallelize: {time.perf_counter() - start:.1f} s", flush=True)
    index, count = pm.batch_coordinate
    mine = slice(index * args.batch_size // count, (index + 1) * args.batch_size // count)
    adamw = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    # ZeRO's stages 1 and 2 need an optimizer that knows shares; at 3 the parameters are shares, and this one
    # steps them tile by tile. So do 16-bit parameters, for their float32 masters, and the loss scale of
    # float16.
    sharded = options.zero or precision != "fp32"
    scaled = dict(loss_scale="dynamic") if precision == "fp16" else {}
    optimizer = (
        tedfx.optim.ShardedOptimizer(pm, torch.optim.AdamW, **scaled, **adamw)
        if sharded
        else torch.optim.AdamW(pm.parameters(), **adamw)
    )
    decay = lambda step: 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / max(1, args.warmup)) * decay(step)
    )
    draw = torch.Generator().manual_seed(args.seed)  # of the global batch: the same stream on any mesh
    stream = {name: getattr(args, name) for name in ("seed", "batch_size", "sequence_length")}
    checkpoints = tedfx.Checkpointer(
        args.checkpoint_dir, pm, optimizer, scheduler=schedule, extra={"draw": draw}
    )
    first = 0
    if args.save_every:
        checkpoints.claim()  # a second run in this folder is told now, not after its first steps
    if args.export:
        pm.save_pretrained(args.export, dry_run=True)  # likewise a folder that cannot be written to
    if args.resume != "no":
        resumed = checkpoints.load(
            "auto" if args.resume == "older" else args.resume, older=args.resume == "older"
        )
        if resumed is not None:
            first = resumed.step
            other = [
                f"--{name.replace('_', '-')} {value}"
                for name, value in resumed.position.items()
                if stream[name] != value
            ]
            if other:
                raise ConfigError(
                    f"{resumed.path} was saved with {' '.join(other)}: resume with the same, else the "
                    "batches are others"
                )
            if first >= args.steps:
                raise ConfigError(
                    f"{resumed.path} has {first} steps behind it, --steps {args.steps} has nothing left "
                    "to do: raise --steps"
                )
            if args.check:
                model.load_state_dict(pm.gather_parameters(buffers=True))
        say(
            f"resumed from {resumed.path}, step {first}"
            if resumed
            else f"nothing to resume in {args.checkpoint_dir}: from the start",
            flush=True,
        )
    held_starts = torch.linspace(
        0,
        len(validation) - args.sequence_length,
        -(-args.eval_sequences // args.batch_size) * args.batch_size,
    ).long()

    @torch.no_grad()
    def validate() -> float:
        """Nats per byte on held-out text. Each rank sums over its own rows; replicas add the same to both
        sums."""
        pm.eval()
        sums = torch.zeros(2, dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
        for starts in held_starts.split(args.batch_size):
            ids = windows(validation, starts[mine], args.sequence_length, device)
            logits = pm(input_ids=ids).logits[:, :-1]
            sums[0] += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            sums[1] += ids[:, 1:].numel()
        pm.train()
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    if rank == 0:
        entropy, held_entropy = bigram(training, validation)
        args.out.mkdir(parents=True, exist_ok=True)
        earlier = read_log(args.out / "log.jsonl", first) if first else []
        log = open(args.out / "log.jsonl", "w")
        record = lambda **fields: print(json.dumps(fields), file=log, flush=True)
        record(
            model=type(model).__name__,
            parameters=weights,
            mesh=args.mesh,
            device=device,
            world=dist.get_world_size(),
            torch=torch.__version__,
            bigram_entropy=entropy,
            bigram_held_out=held_entropy,
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "mesh"},
        )
        for fields in earlier:
            record(**fields)
    else:
        earlier, record = [], lambda **fields: None

    # Step 3: train.
    model = model if args.check else None
    bar = tqdm(
        total=args.steps,
        initial=first,
        disable=rank != 0,
        unit="step",
        dynamic_ncols=True,
        delay=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    losses = {fields["step"]: fields["loss"] for fields in earlier if "loss" in fields}
    validations = [
        (fields["step"], fields["validation_loss"])
        for fields in earlier
        if "step" in fields and "validation_loss" in fields
    ]
    speed = 0.0
    for step in range(first, args.steps):
        began = time.perf_counter()
        starts = torch.randint(len(training) - args.sequence_length, (args.batch_size,), generator=draw)
        ids = windows(training, starts[mine], args.sequence_length, device)
        loss = backward(
            pm, ids.chunk(args.micro_batches), args.layered, optimizer.scale if sharded else lambda x: x
        )
        if step == first and rank == 0:
            print(
                pm.explain(
                    batch=rows // args.micro_batches,
                    sequence=args.sequence_length,
                    micro_batches=args.micro_batches if args.micro_batches > 1 else None,
                ),
                flush=True,
            )
        if model is not None:
            gradients, scale = pm.gather_gradients(), optimizer.loss_scale if sharded else 1.0
            if precision == "fp16" and not all(
                g.isfinite().all() for g in gradients.values()
            ):  # the same on all ranks
                say(
                    f"step {step + 1}: gradients overflow at loss scale {scale:g}; it is left out, and "
                    "the check waits for the next",
                    flush=True,
                )
            else:
                parts = starts.view(count, args.micro_batches, -1).transpose(
                    0, 1
                )  # what all ranks run at a time
                whole = (
                    [windows(training, part.reshape(-1), args.sequence_length, device) for part in parts]
                    if rank == 0
                    else []
                )
                fine = [rank != 0 or check_first_step(model, loss, gradients, whole, precision, scale)]
                dist.broadcast_object_list(fine)
                if not fine[0]:
                    raise SystemExit(
                        "pretrain: the first step is not the single device's (above)" if rank == 0 else 1
                    )
                model = None
            del gradients
        norm = (
            optimizer.clip_grad_norm_(1.0)
            if sharded
            else torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0)
        )
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        losses[step + 1] = loss.item()
        norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
        if not math.isfinite(losses[step + 1]):
            raise ConfigError(f"the loss is {losses[step + 1]} at step {step + 1}: a lower --lr may help")
        seconds = time.perf_counter() - began
        if step > first:  # the first step traces, compiles and checks
            now = args.batch_size * args.sequence_length / seconds
            speed = 0.9 * speed + 0.1 * now if speed else now
        record(step=step + 1, loss=losses[step + 1], gradient_norm=norm, learning_rate=rate, seconds=seconds)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            validations.append((step + 1, validate()))
            record(step=step + 1, validation_loss=validations[-1][1])
        if args.save_every and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            checkpoints.save(step + 1, stream, asynchronous=True)
        shown = dict(loss=f"{losses[step + 1]:.3f}", tokens_per_second=f"{speed:.0f}")
        if validations:
            shown["validation"] = f"{validations[-1][1]:.3f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if stop.agreed(device) and step + 1 < args.steps:
            bar.close()
            if args.save_every and (step + 1) % args.save_every:
                checkpoints.save(step + 1, stream, asynchronous=True)
            checkpoints.wait()
            kept = (
                f"saved to {args.checkpoint_dir}: --resume auto goes on from there"
                if args.save_every
                else "nothing is saved without --save-every"
            )
            say(f"SIGTERM: stopped after step {step + 1} of {args.steps}; {kept}", flush=True)
            dist.barrier()
            return
    bar.close()
    checkpoints.wait()
    if args.export:
        pm.save_pretrained(args.export)
        say(f"weights for from_pretrained: {args.export}", flush=True)

    # Step 4: what came of it.
    if rank == 0:
        final = validations[-1][1]
        record(
            validation_loss=final,
            bigram_entropy=entropy,
            bigram_held_out=held_entropy,
            tokens_per_second=speed,
        )
        log.close()
        plot(args.out / "loss.png", losses, validations, entropy, f"{args.model_type} on {args.mesh}")
        print(
            f"training loss {losses[min(losses)]:.3f} -> {losses[args.steps]:.3f} in {args.steps} "
            f"steps, {speed:.0f} tokens/s over all ranks"
        )
        print(
            f"validation loss {final:.3f} nats/byte; bigrams: entropy {entropy:.3f} (training text), "
            f"cross-entropy {held_entropy:.3f} (held-out text)"
        )
        print(f"wrote {args.out / 'log.jsonl'} and {args.out / 'loss.png'}")
    dist.barrier()


def read_log(path: Path, step: int) -> list[dict]:
    """What the log of the run that is resumed says up to `step`; nothing where there is no log, or its last
    line was cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:  # written when the process was killed
            break
        if "model" not in fields and fields.get("step", step + 1) <= step:
            found.append(fields)
    return found


def plot(
    path: Path, losses: dict[int, float], validations: list[tuple[int, float]], entropy: float, title: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(
        *zip(*sorted(losses.items())),
        color="#9db4d0",
        linewidth=1,
        label="training (with the model's router loss)",
    )
    axes.plot(*zip(*validations), color="#1f4e8c", marker="o", markersize=4, label="validation")
    axes.axhline(
        entropy, color="#888888", linestyle="--", linewidth=1, label=f"bigram entropy, {entropy:.2f}"
    )
    axes.set(xlabel="step", ylabel="nats per byte", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    tedfx.run(main, parse_args())
