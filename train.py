"""
Train a GPT on what prepare.py has written.

    python train.py                                       the default run
    python train.py --dataset=NAME --max_minutes=10       as good as ten minutes make it
    python train.py --init_from=resume                    go on where a run has stopped
    python train.py --init_from=out/ckpt.safetensors --out_dir=out-mine --dataset=mine    finetune
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
max_iters = 600  # steps
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
dropout = 0.1  # share of channels left out at random, against learning by heart
position = 'rotary'  # rotary, learned or none
norm_weights = False  # weights and biases in layer normalization
activation = 'relu2'  # relu2, relu or gelu
bias = False  # biases in linear maps
tied = False  # one table for tokens and head
value_embeddings = True  # a table for the values of each layer
smear = True  # a share of the one before is added to each token and to each key
bigram_iters = 15  # iterations in which table and head learn the counts of pairs, 0 for none
# the optimizer
optimizer = 'muon'  # muon (for the matrices of the blocks, adamw for the rest) or adamw
learning_rate = 0.02  # of adamw
matrix_rate = 0.02  # of muon
table_rate = 0.1  # of adamw for embeddings, if the rest has muon
beta1 = 0.8  # adamw's memory of gradients
beta2 = 0.99  # adamw's memory of their squares
weight_decay = 0.2  # adamw's
matrix_decay = 0.2  # muon's weight decay
warmup_iters = 30  # steps in which the rates rise to their value
decay_lr = True  # let the rates fall to 0 in a line
# the machine
seed = 1337  # what is drawn by lot in step i depends on the seed and i alone
device = 'auto'  # auto, cpu, cuda, mps
threads = 0  # 0 for as many as torch takes by itself
compile = False  # torch.compile
# -------------------------------------------------------------------------------------------------
allowed = dict(
    batch_size=(1, 2**14), gradient_accumulation_steps=(1, 2**14), block_size=(1, 2**16),
    dropout=0.99, position=POSITIONS, activation=[*ACTIVATIONS], optimizer=['muon', 'adamw'],
    beta1=0.9999, beta2=0.9999, threads=1024)
config = override(globals(), **allowed)
quiet()
last = os.path.join(out_dir, 'last.safetensors')  # the newest state
ckpt = os.path.join(out_dir, 'ckpt.safetensors')  # the best model

saved = {}
if init_from == 'resume':  # with the settings of the run, and then the command line once more
    model, tokenizer, saved = load(last)
    globals().update({**saved['settings'], 'out_dir': out_dir, 'init_from': init_from})
    config = override(globals(), **allowed)
    may_change = {'out_dir', 'init_from', 'data_dir', 'max_iters', 'max_minutes', 'eval_interval',
                  'device', 'threads', 'compile'}  # where, how long and on what machine
    for name, value in saved['settings'].items():
        if config[name] != value and name not in may_change:
            fail(f'--{name}={config[name]}: this run has {value}, to its end')

# -------------------------------------------------------------------------------------------------
# One process, or one of several that torchrun has started: the first writes and decides

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
if world > 1:  # each process takes a GPU of its own, or all take the CPU
    gpu = torch.cuda.is_available()
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if gpu else 'cpu'
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo')
if rank:
    sys.stdout = open(os.devnull, 'w')
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
hint = f'prepare it: python prepare.py --source=... --dataset={dataset}'
try:
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
    learned = TOKENIZERS[meta['tokenizer']['kind']](meta['tokenizer']['learned'])
    best_yardstick = min((bits, name) for name, bits in meta['yardsticks'].items())
    # Nats a token times this are bits a character, which compare: a text has as many characters in
    # any tokens. (An unknown token is easy to predict and hides a character: that flatters.)
    to_bits = meta['val']['tokens'] / meta['val']['characters'] / math.log(2)
    train, val = (  # (N,) each, mapped from disk; the bits of these int16 are those of uint16
        torch.from_file(f'{folder}/{name}.bin', size=meta[name]['tokens'], dtype=torch.int16)
        for name in ('train', 'val'))
except Exception as error:  # whatever a file that is missing or damaged may cause
    fail(f'{folder}: no data set that can be read ({type(error).__name__}: {error}); {hint}')


def sequences(ids, starts):
    """Tokens (B, T), and what follows each of them (B, T): -100 beyond the end of the text."""
    places = starts[:, None] + torch.arange(block_size + 1)  # (B, T + 1)
    both = ids[places.clamp(max=len(ids) - 1)].long() & 0xffff
    both[places >= len(ids)] = -100  # which counts for nothing in F.cross_entropy
    return both[:, :-1].clamp(min=0).to(device), both[:, 1:].to(device)


n_sequences = max(1, (len(train) - 1) // block_size - 1)  # one is left for the shift
per_step = batch_size * gradient_accumulation_steps  # sequences
walk_steps = max(1, n_sequences // per_step)


@functools.lru_cache(2)
def walk(n):
    """The n-th walk through the training part: where the sequences of its steps begin, in an order
    drawn anew. So nearly all of the text is seen once before any of it is seen twice. The shift
    makes them begin elsewhere in each walk."""
    chance = torch.Generator().manual_seed(seed * 2**32 + n)
    most = max(1, min(block_size, len(train) - n_sequences * block_size))
    shift = torch.randint(most, (1,), generator=chance)
    order = torch.randperm(max(n_sequences, per_step), generator=chance)[:walk_steps * per_step]
    starts = order % n_sequences * block_size + shift  # a short text is met more than once
    return starts.view(walk_steps, gradient_accumulation_steps, batch_size)


def get_batch(i):
    """Step i's tokens, a pair (x, y) for each accumulation step. Of several processes each takes
    its share, and DistributedDataParallel the mean of their gradients."""
    n, step = divmod(i, walk_steps)
    return [sequences(train, starts[rank::world]) for starts in walk(n)[step]]


# -------------------------------------------------------------------------------------------------
# The model: new, or as it was saved

if init_from == 'scratch':
    torch.manual_seed(seed)
    tokenizer = learned
    shape = {name: config[name] for name in GPTConfig.__dataclass_fields__ if name in config}
    try:
        model = GPT(GPTConfig(len(learned.tokens), **shape))
    except AssertionError as error:
        fail(f'no such model: {error}')
    learn_pairs(model, train[:2**22].long() & 0xffff, bigram_iters)
elif init_from != 'resume':  # weights, tokenizer and shape from there, all else fresh
    model, tokenizer, _ = load(init_from)
    block_size = config['block_size'] = model.config.block_size
    model.config.dropout = dropout
if (learned.kind, learned.learned) != (tokenizer.kind, tokenizer.learned):
    source = last if saved else init_from
    fail(f'{folder} has other tokens than the model; {hint} --tokenizer_from={source}')
model.to(device)
if compile:
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is
net = torch.compile(model) if compile else model
if world > 1:
    net = nn.parallel.DistributedDataParallel(net)
updates = Optimizer(model, learning_rate, table_rate, matrix_rate, beta1, beta2,
                    weight_decay=weight_decay, matrix_decay=matrix_decay, muon=optimizer == 'muon')

# With weights and optimizer, this is the whole state of a run: so a resumed one is the same, bit
# for bit, on as many threads and processes, unless it runs by the clock.
i, seconds, losses, log, wrote = 0, 0.0, [], [], []
if saved:
    try:
        i, seconds, losses = saved['step'], saved['seconds'], saved['losses']
        log, wrote = saved['log'], saved['wrote']
        for name, tensor in updates.state.items():
            tensor.copy_(saved['state'][name])
    except (KeyError, RuntimeError) as error:
        fail(f'{last}: no run that can be resumed ({error!r})')

# -------------------------------------------------------------------------------------------------
# How it is measured. Each evaluation reads the same evenly spaced parts of the validation text,
# at least 2^14 tokens or all if there are fewer: by these the best model is chosen, since like is
# compared with like. At the end the best model reads the whole part, and that is the result.

every_start = torch.arange(0, len(val) - 1, block_size)  # where a sequence begins
few_starts = every_start[::max(1, len(val) // 2**14)]


@torch.inference_mode()
def evaluate(model, starts):
    """The mean of -log p, in nats, over the validation text's sequences that begin there."""
    total, n = 0.0, 0
    for some in starts.split(max(1, 2048 // block_size)):
        x, y = sequences(val, some)
        with autocast:
            logits = model(x)  # (B, T, V)
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='sum').item()
        n += (y >= 0).sum().item()
    return total / n


def sound(x):
    """Return a loss or a weight that is finite. One that isn't ends the run; nothing is saved."""
    if not math.isfinite(x):
        fail(f'step {i}: the loss is {x}; most likely a rate is too large (--learning_rate, '
             f'--matrix_rate, --table_rate). {ckpt} is the last good model')
    return x


def clock():
    """Seconds of the run so far, those before it was resumed included."""
    return seconds + time.perf_counter() - START


def progress():
    """The share of the run that is done: of its steps, or of its time."""
    if max_minutes:
        return min(1, clock() / (60 * max_minutes))
    return min(1, i / max_iters) if max_iters else 1


def time_left(done):
    left = int(clock() * (1 / done - 1) if done else 60 * max_minutes)
    return f'{left // 60}m{left % 60:02}s left' if done or max_minutes else ''


def write_some():
    """What the model writes now, on one line."""
    prompt = torch.tensor([tokenizer.encode('\\section{')], device=device)
    chance = torch.Generator(device).manual_seed(seed * 2**32 + i)
    text = tokenizer.decode(map(int, generate(model, prompt, 40, generator=chance)))
    return ' '.join(text.split())


def report(done):
    """Evaluate, save, print a line and what the model writes."""
    global best_loss, next_time
    began = clock()
    model.eval()
    loss = sound(evaluate(model, few_starts))
    row = dict(step=i, tokens=i * per_step * block_size, seconds=round(began, 2),
               train_loss=sum(losses) / len(losses) if losses else loss, val_loss=loss,
               val_bpc=loss * to_bits, learning_rate=learning_rate * schedule(done))
    log.append(row)
    wrote.append(write_some())
    losses.clear()
    model.train()
    if keep(model if loss < best_loss else None):
        best_loss = min(loss, best_loss)
    print(f'step {i:5}  train {row["train_loss"]:.2f}  val {loss:.2f}  '
          f'{row["val_bpc"]:.2f} bits/char  {time_left(done)}\n    {wrote[-1][:76]}')
    # A twentieth of the time later, or so much later that evaluations take a tenth of it at most.
    next_time = clock() + max(60 * max_minutes / 20, 9 * (clock() - began))


# -------------------------------------------------------------------------------------------------
# What is kept: the best model, the newest state, a table and a page

def keep(best=None, result=()):
    """Save the newest state and, if it is given, the best model; the last row, of the log or of
    the result, says how good it is. If the disk doesn't let it, say so and go on. Returns True if
    all was saved."""
    sound(sum(w.sum().item() for w in model.parameters()))
    more, rows = dict(settings=config, macros=meta.get('macros', [])), [*log, *result]
    table = [rows[0], *(row.values() for row in rows)]  # the names, and the numbers
    try:
        os.makedirs(out_dir, exist_ok=True)
        if best:
            save(ckpt, best, tokenizer, **rows[-1], **more)
        save(last, model, tokenizer, updates.state, step=i, seconds=clock(), losses=losses,
             log=log, wrote=wrote, **more)
        text = ''.join(','.join(map(str, line)) + '\n' for line in table)
        write(f'{out_dir}/log.csv', text.encode())
        if os.path.exists(PAGE):
            write_page(f'{out_dir}/run.html', kind='run', title=f'The run in {out_dir}', rows=log,
                       wrote=wrote, result=result, yardsticks=meta['yardsticks'], aside=aside,
                       running=not (result or stopping))
        return True
    except OSError as error:
        print(f'not saved ({error}); what was saved before is whole', file=sys.stderr)


def on_signal(number, frame):
    """The first time: end after this step. The second time: at once."""
    global stopping
    stopping = number
    signal.signal(number, signal.SIG_DFL)


def claim():
    """Lock the run's folder. The system lets go of it when the process ends, however it ends."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = sqlite3.connect(f'{out_dir}/.lock', timeout=0)
        lock.execute('BEGIN EXCLUSIVE')
        return lock
    except (OSError, sqlite3.Error) as error:
        fail(f'--out_dir={out_dir}: another train.py is at work there, or it cannot be written '
             f'({error})')


stopping = 0  # the number of the signal that asked for it
next_time = 0.0  # of an evaluation, in a run by the clock
best_loss = min((row['val_loss'] for row in log), default=math.inf)  # that was saved
on_stop(on_signal)
aside = None  # the newest run that was moved aside, if its data set has this name
if rank == 0:
    lock, run = claim(), os.path.normpath(out_dir)
    if not saved and (os.path.exists(last) or os.path.exists(ckpt)):
        moved = next(f'{run}.{n}' for n in itertools.count(1) if not os.path.exists(f'{run}.{n}'))
        lock.close()
        os.rename(run, moved)
        lock = claim()
        print(f'the run that was in {out_dir} is now in {moved}')
    with suppress(Exception):  # whatever is in such a folder
        path = max(glob.glob(f'{glob.escape(run)}.*/last.safetensors'), key=os.path.getmtime)
        with open(path, 'rb') as file:
            _, before = read_header(file)
        if before['settings']['dataset'] == dataset:
            aside = dict(title=os.path.dirname(path), rows=before['log'])

# -------------------------------------------------------------------------------------------------
# The loop

def schedule(done):
    """What share of the full rates step i takes: what rises to 1 in the first steps, times what
    falls to 0 in a line."""
    return min(1, (i + 1) / (warmup_iters + 1)) * (1 - done if decay_lr else 1)


def due():
    """Whether to evaluate before step i: every eval_interval steps, or some twenty times."""
    if max_minutes and not eval_interval:
        return clock() >= next_time
    return i % (eval_interval or max(1, math.ceil(max_iters / 20))) == 0


if not os.path.exists(PAGE):
    print(f'there is no {PAGE}, so there will be no page of this run')
print(f'{model.config.n_params:,} parameters; {len(train):,} tokens, {walk_steps:,} steps to see '
      f'them once; {device}' + (f'; resumed at step {i}' if i else ''))
while True:
    state = torch.tensor([progress(), due(), stopping], dtype=torch.float64)
    if world > 1:
        dist.broadcast(state, 0)  # the first process decides
    done, now, stop = state.tolist()
    if done == 1 and i == 0 and max_minutes:
        fail(f'--max_minutes={max_minutes} is over before the first step; take more')
    if rank == 0 and (now or done == 1) and not (log and log[-1]['step'] == i):
        report(done)
    if done == 1 or stop:
        break

    torch.manual_seed(seed * 2**32 + i * world + rank)  # for dropout
    share, loss = schedule(done), 0
    for x, y in get_batch(i):  # (B, T) each
        with autocast:
            logits = net(x)  # (B, T, V)
            mean = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        mean = mean / gradient_accumulation_steps
        mean.backward()
        loss += mean.item()
    losses.append(sound(loss))
    updates.step(i + 1, share)
    model.zero_grad()
    i += 1
    if sys.stdout.isatty():  # one line, rewritten in place
        print(f'step {i:5}  train {loss:.2f}  {time_left(done)}'.ljust(50), end='\r', flush=True)

# -------------------------------------------------------------------------------------------------
# The end: the best model reads the whole validation part

if world > 1:
    dist.barrier()
    dist.destroy_process_group()
if stop:
    how = ', saved' if rank == 0 and keep() else ''
    print(f'\nstopped at step {i}{how}; to go on: '
          f'python train.py --init_from=resume --out_dir={out_dir}')
    sys.exit(128 + int(stop))
if rank == 0:
    best, _, about = load(ckpt)
    loss = evaluate(best.to(device).eval(), every_start)
    result = {**{name: about[name] for name in log[0]}, 'seconds': round(clock(), 2),
              'val_loss': loss, 'val_bpc': loss * to_bits}
    if not keep(best, [result]):
        fail(f'the end of the run could not be saved in {out_dir}')
    bits, name = best_yardstick
    print(f'best of step {result["step"]}, on the whole validation part: '
          f'{result["val_bpc"]:.3f} bits/char ({name}: {bits:.3f})')
    print(f'finished: {ckpt}, and {out_dir}/run.html for a browser')
    print(f'to see it write: python sample.py --out_dir={out_dir}; with --tex=dream.tex, a paper')
