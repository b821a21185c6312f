"""
Train a GPT on what prepare.py has written.

    python train.py                                       the default run
    python train.py --dataset=NAME --max_minutes=10       as good as ten minutes make it
    python train.py --init_from=resume                    go on where a run has stopped
    python train.py --init_from=out/ckpt.safetensors --out_dir=mine --dataset=NAME    finetune
    torchrun --nproc_per_node=2 train.py                  on two processes
"""
import ctypes
import functools
import glob
import itertools
import json
import math
import os
import signal
import sqlite3
import sys
import time
from contextlib import nullcontext, suppress

from gpt import ACTIVATIONS, GPT, GPTConfig, Optimizer, POSITIONS, TOKENIZERS
from gpt import PAGE, fail, generate, learn_pairs, load, on_stop, override, pick_device, quiet
from gpt import read_header, save, write, write_page
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

START = time.perf_counter()
# -------------------------------------------------------------------------------------------------
# where
out_dir = 'out'  # the folder of the run
data_dir = 'data'  # the folder of data sets
dataset = 'papers'  # the data set
init_from = 'scratch'  # scratch, resume, or the path of a checkpoint to finetune
# how long
max_iters = 900  # steps
max_minutes = 0.0  # if above 0, this many minutes in place of max_iters
eval_interval = 0  # steps from one evaluation to the next, 0 for twenty in a run
# the batch of one step
batch_size = 8  # stretches of text that go through the model at once (B)
gradient_accumulation_steps = 1  # so many such batches, one after the other, make one step
block_size = 256  # tokens that the model sees at once (T)
# the model
n_layer = 3  # blocks (L), 0 for the bigram model
n_head = 2  # heads of self-attention (H)
n_embd = 96  # channels (C)
head_dim = 0  # dimension of a head (D), 0 for n_embd / n_head
mlp_dim = 0  # width of the MLP (M), 0 for 4 n_embd
dropout = 0.2  # share of channels left out at random, against learning by heart
position = 'rotary'  # rotary, learned or none
norm_weights = False  # weights and biases in layer normalization
activation = 'relu2'  # relu2, relu or gelu
bias = False  # biases in linear maps
tied = False  # one table for tokens and head
value_embeddings = True  # a table for the values of each layer
smear = True  # a share of the token before added to each
bigram_iters = 15  # iterations in which table and head learn the counts of pairs, 0 for none
# the optimizer
optimizer = 'muon'  # muon (for the matrices of the blocks, adamw for the rest) or adamw
learning_rate = 0.02  # of adamw
matrix_rate = 0.02  # of muon
table_rate = 0.1  # of adamw for embeddings, if the rest has muon
beta1 = 0.8  # adamw's memory of gradients
beta2 = 0.99  # adamw's memory of their squares
weight_decay = 0.2  # adamw's
matrix_decay = 0.0  # muon's weight decay
grad_clip = 0.0  # the largest norm of the gradient, 0 for any
warmup_iters = 30  # steps in which the rates rise to their value
decay_lr = True  # let the rates fall to 0 in a line
# the machine
seed = 1337  # what step i does depends on the seed and i alone
device = 'auto'  # auto, cpu, cuda, mps
threads = 0  # 0 for as many as torch takes by itself
compile = False  # torch.compile
# -------------------------------------------------------------------------------------------------
allowed = dict(
    batch_size=(1, 2**14), gradient_accumulation_steps=(1, 2**14), block_size=(1, 2**16),
    dropout=0.99, position=POSITIONS, activation=[*ACTIVATIONS], optimizer=['muon', 'adamw'],
    beta1=0.9999, beta2=0.9999, threads=1024)
config = override(globals(), **allowed)
quiet(closed_pipe=signal.SIG_IGN)  # a run goes on without its screen
last = os.path.join(out_dir, 'last.safetensors')  # the newest state
ckpt = os.path.join(out_dir, 'ckpt.safetensors')  # the best model

# -------------------------------------------------------------------------------------------------
# One process, or one of several that torchrun has started

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
if world > 1:  # each process takes a GPU of its own, or all take the CPU
    gpu = torch.cuda.is_available()
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if gpu else 'cpu'
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo')


def say(text, **how):
    """Print, from the first process; a screen that is full or gone stops nothing."""
    try:
        if rank == 0:
            print(text, flush=True, **how)
    except OSError:
        sys.stdout = open(os.devnull, 'w')


def too_large(kind, error, trace):
    """What doesn't fit into memory is said in one line; any other error comes as it is."""
    if kind is MemoryError or 'memory' in str(error):
        fail('no memory for this: take a smaller --batch_size, --block_size or --n_embd')
    sys.__excepthook__(kind, error, trace)


sys.excepthook = too_large
saved = {}
if init_from == 'resume':  # with the settings of the run, and then the command line once more
    model, tokenizer, saved = load(last)
    try:
        old = {name: type(value)(saved['settings'][name]) for name, value in config.items()}
    except (KeyError, TypeError, ValueError) as error:
        fail(f'{last}: no run that can be resumed ({error})')
    globals().update({**old, 'out_dir': out_dir, 'init_from': 'resume'})
    config = override(globals(), **allowed)
    # Where a run is, how long it takes and the machine may change when it goes on.
    for name in old.keys() - {'out_dir', 'init_from', 'data_dir', 'max_iters', 'max_minutes',
                              'eval_interval', 'device', 'threads', 'compile'}:
        if config[name] != old[name]:
            fail(f'--{name}={config[name]}: this run has {old[name]}, to its end')
if batch_size % world:  # with equal shares the mean of the processes' means is the mean
    fail(f'--batch_size={batch_size}: wanted a multiple of the {world} processes')
device = pick_device(device)
autocast = torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else nullcontext()
torch.set_flush_denormal(True)  # numbers near 1e-40 are slow and say nothing
if threads:
    torch.set_num_threads(threads)
with suppress(AttributeError, TypeError):  # for a C library that is not glibc
    # Keep memory that was freed: to give it back and fetch it anew took up to a third of a step.
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

# -------------------------------------------------------------------------------------------------
# The data: tokens of the training and of the validation part

folder = os.path.join(data_dir, dataset)
again = f'prepare it: python prepare.py --source=... --dataset={dataset}'
try:
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
    learned = TOKENIZERS[meta['tokenizer']['kind']](meta['tokenizer']['learned'])
    V, yardsticks = len(learned.tokens), meta['yardsticks']
    best_stick = min(yardsticks, key=yardsticks.get)
    # Nats a token times this are bits a character, which compare: a text has as many characters in
    # any tokens. (An unknown token is easy to predict and hides a character: that flatters.)
    to_bits = meta['val']['tokens'] / meta['val']['characters'] / math.log(2)
    parts = {}
    for name in 'train', 'val':  # mapped from disk: (N,) int16, whose bits are those of uint16
        path, size = os.path.join(folder, f'{name}.bin'), meta[name]['tokens']
        assert os.path.getsize(path) == 2 * size >= 4, f'{path} is not as meta.json says'
        parts[name] = torch.from_file(path, size=size, dtype=torch.int16)
    train, val = parts['train'], parts['val']
except Exception as error:  # whatever a file that is missing or damaged may cause
    fail(f'{folder}: no data set that can be read ({type(error).__name__}: {error}); {again}')


def blocks(ids, starts):
    """Blocks of tokens (B, T), and what follows each token (B, T): -100 beyond the end."""
    places = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    both = ids[places.clamp(max=len(ids) - 1)].long() & 0xffff
    both[places >= len(ids)] = -100  # which counts for nothing in F.cross_entropy
    return both[:, :-1].clamp(min=0).to(device), both[:, 1:].to(device)


@functools.lru_cache(2)
def walk(n):
    """The n-th walk through the training part: where its blocks begin, in an order drawn anew. So
    each token, but for fewer than a block at either end, is seen once before any is seen twice."""
    chance = torch.Generator().manual_seed(seed * 2**32 + n)
    most = min(block_size, max(1, len(train) - walk_length * block_size))
    shift = torch.randint(most, (1,), generator=chance)
    return torch.randperm(walk_length, generator=chance) * block_size + shift


walk_length = max(1, (len(train) - 1) // block_size - 1)  # blocks; one is left for the shift


def get_batch(i):
    """Step i's blocks, a pair (x, y) for each accumulation step. Of several processes each takes
    its share, and DistributedDataParallel the mean of their gradients."""
    each = gradient_accumulation_steps * batch_size
    starts = [walk(b // walk_length)[b % walk_length] for b in range(i * each, (i + 1) * each)]
    starts = torch.stack(starts).view(gradient_accumulation_steps, batch_size)
    return [blocks(train, row[rank::world]) for row in starts]


# -------------------------------------------------------------------------------------------------
# The model: new, or as it was saved

if init_from == 'scratch':
    torch.manual_seed(seed)
    tokenizer = learned
    shape = {name: config[name] for name in GPTConfig.__dataclass_fields__ if name in config}
    try:
        model = GPT(GPTConfig(V, **shape))
    except AssertionError as error:
        fail(f'no such model: {error}')
    learn_pairs(model, train[:2**22].long() & 0xffff, bigram_iters)
elif init_from != 'resume':  # weights, tokenizer and shape from there, all else fresh
    model, tokenizer, _ = load(init_from)
    block_size = config['block_size'] = model.config.block_size
    model.config.dropout = dropout
if (learned.kind, learned.learned) != (tokenizer.kind, tokenizer.learned):
    source = last if saved else init_from
    fail(f'{folder} has other tokens than the model; {again} --tokenizer_from={source}')
model.to(device)
if compile:
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is
net = torch.compile(model) if compile else model
if world > 1:
    net = nn.parallel.DistributedDataParallel(net)
updates = Optimizer(model, learning_rate, table_rate, matrix_rate, beta1, beta2,
                    weight_decay=weight_decay, matrix_decay=matrix_decay, muon=optimizer == 'muon')
step_tokens = batch_size * gradient_accumulation_steps * block_size
COLUMNS = ['step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'val_bpc', 'learning_rate']
# With weights and optimizer, this is the whole state of a run: so a resumed one is the same, bit
# for bit, on as many threads, unless the clock ends it. A row of the log: COLUMNS, and a sample.
i, seconds, losses, log = 0, 0.0, [], []
if saved:
    try:
        i, seconds, losses, log = (saved[name] for name in ('step', 'seconds', 'losses', 'log'))
        assert isinstance(i, int) and i >= 0 and all(len(row) == 8 for row in log)
        assert math.isfinite(seconds + sum(losses) + sum(sum(row[:7]) for row in log))
        shapes = {name: tensor.shape for name, tensor in updates.state.items()}
        assert shapes == {name: tensor.shape for name, tensor in saved['state'].items()}
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        fail(f'{last}: no run that can be resumed ({error!r})')
    for name, tensor in updates.state.items():
        tensor.copy_(saved['state'][name])

# -------------------------------------------------------------------------------------------------
# How it is measured. Each evaluation reads the same evenly spaced blocks of the validation part,
# 2^14 tokens or all if there are fewer: by these the best model is chosen, since like is compared
# with like. At the end the best model reads the whole part, and that is the result.

every_block = torch.arange(0, len(val) - 1, block_size)  # where it begins
few = min(len(every_block), max(1, 2**14 // block_size))
few_blocks = every_block[torch.linspace(0, len(every_block) - 1, few).long()]


@torch.inference_mode()
def evaluate(model, starts):
    """The sum of -log p, in nats, over the tokens of these validation blocks; and their number."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for some in starts.split(max(1, 2048 // block_size)):
        x, y = blocks(val, some)
        with autocast:
            logits = model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='sum')
        total += torch.tensor([loss.item(), (y >= 0).sum().item()])
    model.train()
    return total


def sound(loss):
    """Return a loss that is a number; one that isn't ends the run, and nothing is saved."""
    if not math.isfinite(loss):
        fail(f'step {i}: the loss is {loss}; most likely a rate is too large (--learning_rate, '
             f'--matrix_rate, --table_rate). {ckpt} is the last good model')
    return loss


def clock():
    """Seconds of the run so far, those before it was resumed included."""
    return seconds + time.perf_counter() - START


def done():
    """The share of the run that is done: of its steps, or of its time."""
    if max_minutes:
        return min(1, clock() / (60 * max_minutes))
    return min(1, i / max_iters) if max_iters else 1


def intervals():
    """How many intervals from one evaluation to the next have passed, twenty in a run."""
    return i // eval_interval if eval_interval else int(20 * done())


def due():
    """Whether to evaluate before step i. In a run by the clock evaluations take at most a tenth of
    the time."""
    return not log or (intervals() > evaluated and measuring < clock() / 10)


def time_left(progress):
    left = clock() * (1 / progress - 1) if progress else 60 * max_minutes
    return f'{left // 60:.0f}m{left % 60:02.0f}s left' if progress or max_minutes else ''


def write_some():
    """What the model writes now, on one line."""
    model.eval()
    chance = torch.Generator(device).manual_seed(seed * 2**32 + i)
    prompt = torch.tensor([tokenizer.encode('\\section{')], device=device)
    ids = generate(model, prompt, 40, generator=chance)
    text = ''.join(tokenizer.stream(int(token) for token in ids))
    model.train()
    return ' '.join(text.split())


def report(progress):
    """Evaluate, print a line and what the model writes, save."""
    global evaluated, measuring
    began = time.perf_counter()
    total = evaluate(model, few_blocks[rank::world])
    total = torch.cat((total, torch.tensor([sum(losses), len(losses)])))
    if world > 1:
        dist.all_reduce(total)
    val_loss = sound((total[0] / total[1]).item())
    train_loss = (total[2] / total[3]).item() if losses else val_loss
    better = all(val_loss < row[4] for row in log)
    log.append([i, i * step_tokens, round(clock(), 2), train_loss, val_loss, val_loss * to_bits,
                learning_rate * schedule(progress), write_some()])
    losses.clear()
    say(f'step {i:5}  train {train_loss:.2f}  val {val_loss:.2f}  '
        f'{val_loss * to_bits:.2f} bits/char  {time_left(progress)}\n    {log[-1][7][:76]}')
    keep(model if better else None)
    evaluated = intervals()
    measuring += time.perf_counter() - began if max_minutes else 0


# -------------------------------------------------------------------------------------------------
# What is kept: the best model, the newest state, a table and a page

def keep(best=None, result=None):
    """Save the newest state, and the best model if there is a better one. If the disk doesn't let
    it, say so and go on."""
    if rank:
        return True
    sound(sum(w.sum().item() for w in model.parameters()))
    newest = result or log[-1]
    rows = [COLUMNS, *log, *([result] if result else [])]
    more = dict(settings=config, macros=meta.get('macros', []))
    try:
        os.makedirs(out_dir, exist_ok=True)
        if best:
            save(ckpt, best, tokenizer, step=newest[0], val_bpc=newest[5], **more)
        save(last, model, tokenizer, updates.state, step=i, seconds=clock(), losses=losses,
             log=log, **more)
        write(os.path.join(out_dir, 'log.csv'),
              ''.join(','.join(map(str, row[:7])) + '\n' for row in rows).encode())
        if os.path.exists(PAGE):
            write_page(os.path.join(out_dir, 'run.html'), kind='run', result=result, rows=log,
                       title=f'The run in {out_dir}', running=not (result or stopping),
                       yardsticks=yardsticks, aside=aside())
        return True
    except OSError as error:
        say(f'not saved ({error.filename or out_dir}: {error.strerror}); what was saved before is '
            'whole', file=sys.stderr)
        return False


def aside():
    """The newest run that was moved aside, if it learned from the same data."""
    with suppress(OSError, LookupError, TypeError, ValueError):
        paths = glob.glob(glob.escape(os.path.normpath(out_dir)) + '.*/last.safetensors')
        path = max(paths, key=os.path.getmtime)
        with open(path, 'rb') as file:
            _, about = read_header(file)
        if about['settings']['dataset'] == dataset:
            return dict(title=os.path.dirname(path), rows=about['log'])


def on_signal(number, frame):
    """The first time: end after this step. The second time: at once."""
    global stopping
    stopping = number
    signal.signal(number, signal.SIG_DFL)


def claim():
    """Lock the run's folder, and move a run that is there aside. The system lets go of the lock
    when the process ends, however it ends."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = sqlite3.connect(os.path.join(out_dir, '.lock'), timeout=0)
        lock.execute('BEGIN EXCLUSIVE')
        if saved or not (os.path.exists(last) or os.path.exists(ckpt)):
            return lock
        lock.close()
        names = (f'{os.path.normpath(out_dir)}.{n}' for n in itertools.count(1))
        moved = next(name for name in names if not os.path.exists(name))
        os.rename(out_dir, moved)
    except (OSError, sqlite3.Error) as error:
        fail(f'--out_dir={out_dir}: another train.py is at work there, or it cannot be written '
             f'({error})')
    say(f'the run that was in {out_dir} is now in {moved}')
    return claim()


# -------------------------------------------------------------------------------------------------
# The loop

def schedule(progress):
    """What share of the full rates step i takes: up to 1, then down in a line to 0."""
    return min(1, (i + 1) / (warmup_iters + 1)) * (1 - progress if decay_lr else 1)


stopping = 0  # the number of the signal that says so
evaluated, measuring = intervals(), 0.0  # intervals at the last evaluation; seconds of all of them
on_stop(on_signal)
lock = claim() if rank == 0 else None
if rank == 0 and not os.path.exists(PAGE):
    say(f'there is no {PAGE}, so there will be no page of this run')
say(f'{model.config.n_params:,} parameters, {len(train):,} tokens to learn from, '
    f'{step_tokens:,} in a step; {device}' + (f'; resumed at step {i}' if i else ''))
while True:
    state = torch.tensor([done(), due(), stopping], dtype=torch.float64)
    if world > 1:  # what any process has seen, all have
        dist.all_reduce(state, dist.ReduceOp.MAX)
    progress, now, stop = state.tolist()
    stopping = stopping or stop  # a signal that came meanwhile stays
    if max_minutes and progress == 1 and i == 0:
        fail(f'--max_minutes={max_minutes} is over before the first step; take more')
    if (now or progress == 1) and not (log and log[-1][0] == i):
        report(progress)
    if progress == 1 or stopping:
        break

    torch.manual_seed(seed * 2**32 + i * world + rank)  # for dropout
    share, loss = schedule(progress), 0
    for x, y in get_batch(i):  # (B, T) each
        with autocast:
            logits = net(x)  # (B, T, V)
            mean = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        mean = mean / gradient_accumulation_steps
        mean.backward()
        loss += mean.item()
    losses.append(sound(loss))
    if grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    updates.step(i + 1, share)
    model.zero_grad()
    i += 1
    if sys.stdout.isatty():  # one line, rewritten in place
        say(f'step {i:5}  train {loss:.2f}  {time_left(progress)}'.ljust(50), end='\r')

# -------------------------------------------------------------------------------------------------
# The end: the best model reads the whole validation part

if world > 1:
    dist.barrier()
    dist.destroy_process_group()
if stopping:
    how = ', saved' if keep() else ''
    say(f'\nstopped at step {i}{how}; to go on: '
        f'python train.py --init_from=resume --out_dir={out_dir}')
    sys.exit(128 + int(stopping))
if rank == 0:
    best, _, about = load(ckpt)
    loss, n = evaluate(best.to(device), every_block).tolist()
    row = min(log, key=lambda row: abs(row[0] - about['step']))  # the evaluation it was saved at
    result = [*row[:2], round(clock(), 2), row[3], loss / n, loss / n * to_bits, row[6]]
    if not keep(best, result):
        fail(f'the end of the run could not be saved in {out_dir}')
    say(f'best of step {row[0]}, on the whole validation part: {result[5]:.3f} bits/char '
        f'({best_stick}: {yardsticks[best_stick]:.3f})')
    say(f'finished: {ckpt}, and {out_dir}/run.html for a browser')
    say(f'to see it write: python sample.py --out_dir={out_dir}; with --tex=dream.tex, a paper')
