"""
Train a GPT on what prepare.py has written.

    python train.py                                       the default run
    python train.py --dataset=NAME --max_minutes=10       as good as ten minutes make it
    python train.py --init_from=resume                    go on where a run has stopped
    python train.py --init_from=out/ckpt.safetensors --out_dir=out-mine --dataset=mine    finetune
    torchrun --nproc_per_node=2 train.py                  on two processes
"""
import json
import math
import os
import signal
import sqlite3
import sys
import time
from contextlib import suppress
from pathlib import Path

from gpt import ACTIVATIONS, GPT, GPTConfig, Optimizer, POSITIONS, TOKENIZERS
from gpt import PAGE, fail, generate, learn_pairs, load, on_stop, override, pick_device, quiet
from gpt import save, write, write_page
import torch
import torch.distributed as dist
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
learning_rate = 0.02  # how far a step goes; beside muon, tables go five times as far
weight_decay = 0.2  # the share of each weight, times the rate, that a step takes away
warmup_iters = 30  # steps in which the rate rises to its value
decay_lr = True  # let the rate fall to 0 linearly
# the machine
seed = 1337  # what is drawn by lot in step i depends on the seed and i alone
device = 'auto'  # auto, cpu, cuda, mps
threads = 0  # 0 for as many as torch takes by itself
compile = False  # torch.compile
# -------------------------------------------------------------------------------------------------
config = override(
    globals(), batch_size=[1, 10_000], gradient_accumulation_steps=[1, 10_000],
    block_size=[1, 100_000], dropout=[0, 0.99], position=POSITIONS, activation=[*ACTIVATIONS],
    optimizer=['muon', 'adamw'])
quiet()
last = f'{out_dir}/last.safetensors'  # the newest model, and the optimizer's state
ckpt = f'{out_dir}/ckpt.safetensors'  # the best model alone

path = last if init_from == 'resume' else init_from
if init_from != 'scratch':
    model, tokenizer, saved = load(path)
if init_from == 'resume':
    # The settings are those of the run. Then the command line may change where, how long and on
    # what machine it goes on. Anything else is fixed: its bounds are the value it had, twice.
    settings = saved['settings']
    globals().update({**settings, 'out_dir': out_dir, 'init_from': init_from})
    may_change = {'out_dir', 'init_from', 'data_dir', 'max_iters', 'max_minutes', 'eval_interval',
                  'device', 'threads', 'compile'}
    fixed = {name: [settings[name]] * 2 for name in settings if name not in may_change}
    config = override(globals(), **fixed)

# -------------------------------------------------------------------------------------------------
# One process, or one of several that torchrun has started: the first writes and decides

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
if world > 1:  # each process takes a GPU of its own, or all take the CPU
    gpu = device != 'cpu' and torch.cuda.is_available()
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if gpu else 'cpu'
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo')
if batch_size % world:  # with equal shares the mean of the processes' means is the mean
    fail(f'--batch_size={batch_size}: wanted a multiple of the {world} processes')
device = pick_device(device)
autocast = torch.autocast('cuda', torch.bfloat16, enabled='cuda' in device)
torch.set_flush_denormal(True)  # numbers near 1e-40 are slow and say nothing
if threads:
    torch.set_num_threads(threads)

# -------------------------------------------------------------------------------------------------
# The data: tokens of the training and of the validation part

folder = f'{data_dir}/{dataset}'
hint = f'prepare it: python prepare.py --source=... --dataset={dataset}'
try:
    meta = json.loads(Path(folder, 'meta.json').read_text('utf-8'))
    learned = TOKENIZERS[meta['tokenizer']['kind']](meta['tokenizer']['learned'])
    # Nats a token times this are bits a character. They can be compared between tokenizers, except
    # that an unknown token flatters: it is easy to predict, and hides a character.
    to_bits = meta['val']['tokens'] / meta['val']['characters'] / math.log(2)
    train, val = (  # (N,) each, mapped from disk as int16: torch 2.2 has no uint16
        torch.from_file(f'{folder}/{name}.bin', size=meta[name]['tokens'], dtype=torch.int16)
        for name in ('train', 'val'))
except Exception as error:  # whatever a file that is missing or damaged may cause
    fail(f'{folder}: no data set that can be read ({type(error).__name__}: {error}); {hint}')

# -------------------------------------------------------------------------------------------------
# The model: new, or as it was saved

if init_from == 'scratch':
    torch.manual_seed(seed)
    tokenizer = learned
    shape = {name: config[name] for name in GPTConfig.__dataclass_fields__ if name in config}
    model = GPT(GPTConfig(len(learned.tokens), **shape))
    learn_pairs(model, train[:2**22].long() & 0xffff, bigram_iters)
elif init_from != 'resume':  # weights, tokenizer and shape from there, all else fresh
    block_size = config['block_size'] = model.config.block_size
    model.config.dropout = dropout
if learned.learned != tokenizer.learned:
    fail(f'{folder} has other tokens than the model; {hint} --tokenizer_from={path}')
model.to(device)
net = model
if compile:
    torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is
    net = torch.compile(model)
if world > 1:  # the gradient is the mean of those of all processes
    net = torch.nn.parallel.DistributedDataParallel(net)
updates = Optimizer(model, learning_rate, weight_decay, muon=optimizer == 'muon')

# With weights and optimizer, this is the whole state of a run: so a resumed one is the same, bit
# for bit, on the same number of threads and processes, unless it runs by the clock.
i, seconds, losses, log, wrote = 0, 0.0, [], [], []
aside = None  # the log of the run that was moved aside
if init_from == 'resume':
    try:
        globals().update(saved['run'])
        for name, tensor in updates.state.items():
            tensor.copy_(saved['state'][name])
    except Exception as error:  # whatever such a file may lack
        fail(f'{last}: no run that can be resumed ({error!r})')

# -------------------------------------------------------------------------------------------------
# Batches of sequences, each of T + 1 tokens: x is the first T of them, and y what follows each

if len(train) <= block_size:
    fail(f'{folder} has {len(train)} tokens to train; more papers are needed, or a smaller '
         f'--block_size than {block_size}')
per_step = batch_size * gradient_accumulation_steps * block_size  # tokens
golden = (5**0.5 - 1) / 2  # 0.618...


def xy(data, starts):
    """The sequences that begin at these tokens of the data: x and y, (B, T) each."""
    rows = torch.stack([data[t:t + block_size + 1] for t in starts])  # (B, T + 1)
    rows = rows.to(device).long() & 0xffff  # from int16 to 0 ... 65535
    return rows[:, :-1], rows[:, 1:]


def get_batch(n):
    """Batch n = 0, 1, 2, ... of the training text.

    Of all places where a sequence can begin, sequence k begins at the share {k g}, the fractional
    part of k g. For an irrational g this is in a widest gap between those before it (Knuth, The
    Art of Computer Programming, section 6.4, theorem S). The golden section g keeps the gaps most
    alike. So all of the text is read nearly equally often, but for the T tokens at each end.
    """
    # Of several processes each takes every world-th sequence.
    mine = range(n * batch_size + rank, (n + 1) * batch_size, world)
    return xy(train, [int(k * golden % 1 * (len(train) - block_size)) for k in mine])


# -------------------------------------------------------------------------------------------------
# How it is measured. Each evaluation reads the same evenly spaced blocks of the validation text,
# at least 2^14 tokens or all if there are fewer: by these the best model is chosen. At the end the
# best model reads the whole part, and that is the result.

every_block = range(0, len(val) - 1, block_size)  # where they begin
few_blocks = every_block[::max(1, len(val) // 2**14)]


@torch.inference_mode()
def evaluate(model, blocks):
    """The mean of -log p, in nats, over the tokens of these blocks of the validation text."""
    nats = tokens = 0
    for t in blocks:
        x, y = xy(val, [t])  # (1, T) each; the last block may be shorter
        logits = model(x)  # (1, T, V)
        nats += F.cross_entropy(logits[0], y[0], reduction='sum').item()
        tokens += y.numel()
    return nats / tokens


def clock():
    """Seconds of the run so far, those before it was resumed included."""
    return seconds + time.perf_counter() - START


def progress():
    """The share of the run that is done: of its time, or of its steps."""
    if max_minutes:
        return min(1, clock() / (60 * max_minutes))
    return i / max_iters if i < max_iters else 1


def time_left(done):
    if not done:
        return ''
    left = int(clock() * (1 / done - 1))
    return f'{left // 60}m{left % 60:02}s left'


def due():
    """Whether to evaluate before step i: every eval_interval steps, or some twenty times."""
    if max_minutes and not eval_interval:
        return clock() >= next_time
    return i % (eval_interval or math.ceil(max_iters / 20) or 1) == 0


def report(done, rate):
    """Evaluate, save, print a line and what the model writes."""
    global next_time
    began = clock()
    model.eval()
    loss = evaluate(model, few_blocks)
    best = model if all(loss < row['val_loss'] for row in log) else None
    mean = sum(losses) / len(losses) if losses else loss  # before step 0 there is no other
    log.append(dict(step=i, tokens=i * per_step, seconds=began,
                    train_loss=mean, val_loss=loss, val_bpc=loss * to_bits, learning_rate=rate))
    losses.clear()
    torch.manual_seed(seed + i)
    prompt = torch.tensor([tokenizer.encode('\\section{')], device=device)  # (1, T)
    text = tokenizer.decode(map(int, generate(model, prompt, 40)))
    text = ' '.join(text.split())
    wrote.append(text)
    model.train()
    keep(best)
    print(f'step {i:5}  train {mean:.2f}  val {loss:.2f}  {loss * to_bits:.2f} bits/char  '
          f'{time_left(done)}\n    {text[:76]}')
    # After a twentieth of max_minutes, or later: evaluations take a tenth of the time at most.
    next_time = clock() + max(3 * max_minutes, 9 * (clock() - began))


# -------------------------------------------------------------------------------------------------
# What is kept: the best model, the newest state, a table and a page

def keep(best=None, result=()):
    """Save the newest state and, if it is given, the best model, both with the last row of the
    table: the result or, before there is one, the newest row of the log. Each file is replaced
    whole: if the disk is full, the run ends and can be resumed from what was saved before."""
    rows = [*log, *result]
    run = dict(i=i, seconds=clock(), losses=losses, log=log, wrote=wrote, aside=aside)
    about = dict(rows[-1], run=run, settings=config, macros=meta['macros'])
    os.makedirs(out_dir, exist_ok=True)
    if best:
        save(ckpt, best, tokenizer, **about)
    save(last, model, tokenizer, updates.state, **about)
    table = [rows[0], *(row.values() for row in rows)]  # a dict gives its names, then numbers
    text = ''.join(','.join(map(str, line)) + '\n' for line in table)
    write(f'{out_dir}/log.csv', text.encode())
    if page_there:
        write_page(f'{out_dir}/run.html', kind='run', title=f'The run in {out_dir}', **run,
                   result=result, yardsticks=meta['yardsticks'],
                   running=not (result or stopping))


def claim():
    """Lock the run's folder. The system lets go of it when the process ends, however it ends."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = sqlite3.connect(f'{out_dir}/.lock', timeout=0)
        lock.execute('BEGIN EXCLUSIVE')
        return lock
    except Exception as error:  # of the disk, or of the lock
        fail(f'--out_dir={out_dir}: another train.py is at work there, or it cannot be written '
             f'({error})')


def on_signal(number, frame):
    """The first time: end after this step. The second time: at once."""
    global stopping
    stopping = number
    signal.signal(number, signal.SIG_DFL)


stopping = 0  # the number of the signal that asked for it
next_time = 0.0  # of an evaluation, in a run by the clock
page_there = os.path.exists(PAGE)
on_stop(on_signal)
if rank == 0:
    lock, here = claim(), Path(out_dir)
    if init_from != 'resume' and any(here.glob('*.safetensors')):
        n = 1
        while os.path.exists(f'{here}.{n}'):
            n += 1
        with suppress(Exception):  # the page shows it as a pale curve, if it compares
            _, _, before = load(last)
            if before['settings']['dataset'] == dataset:
                aside = dict(title=f'{here}.{n}', rows=before['run']['log'])
        os.rename(here, f'{here}.{n}')
        lock = claim()
        print(f'the run that was in {out_dir} is now in {here}.{n}')
    if not page_there:
        print(f'there is no {PAGE}, so there will be no page of this run')
    print(f'{model.config.n_params:,} parameters; {len(train):,} tokens, '
          f'as many as {math.ceil(len(train) / per_step):,} steps read; {device}; from step {i}')

# -------------------------------------------------------------------------------------------------
# The loop

while True:
    decided = torch.tensor([progress(), due(), stopping], dtype=torch.float64)
    if world > 1:
        dist.broadcast(decided, 0)  # the first process decides
    done, now, stop = decided.tolist()
    assert sum(w.sum() for w in model.parameters()).isfinite(), (
        f'step {i}: a weight is no number any more; most likely '
        f'--learning_rate={learning_rate} is too large. {ckpt} is the last good model')

    # The share of the rate: what rises to 1 in the first steps, times what falls from 1 to 0.
    share = min(1, (i + 1) / (warmup_iters + 1))
    if decay_lr:
        share *= 1 - done
    # Not twice at one step: after a report there are no losses until the next step.
    if rank == 0 and (now or done == 1) and (losses or not log):
        report(done, share * learning_rate)
    if done == 1 or stop:
        break

    torch.manual_seed(seed * 1_000_000 + i * world + rank)  # for dropout
    loss = 0
    for part in range(gradient_accumulation_steps):
        x, y = get_batch(i * gradient_accumulation_steps + part)  # (B, T) each
        with autocast:
            logits = net(x)  # (B, T, V)
            mean = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        (mean / gradient_accumulation_steps).backward()
        loss += mean.item() / gradient_accumulation_steps
    losses.append(loss)
    updates.step(i + 1, share)
    model.zero_grad()
    i += 1
    if rank == 0 and os.isatty(1):  # one line, rewritten in place
        print(f'step {i:5}  train {loss:.2f}  {time_left(done)}'.ljust(50), end='\r', flush=True)

# -------------------------------------------------------------------------------------------------
# The end: the best model reads the whole validation part

if world > 1:
    dist.destroy_process_group()
if rank:
    sys.exit()
if stop:
    keep()
    print(f'\nstopped at step {i}, saved; to go on: '
          f'python train.py --init_from=resume --out_dir={out_dir}')
    sys.exit(128 + stopping)
if i == 0 and max_minutes:
    fail(f'--max_minutes={max_minutes} is over before the first step; take more')
best, _, _ = load(ckpt)
loss = evaluate(best.to(device).eval(), every_block)
bits = loss * to_bits
row = min(log, key=lambda row: row['val_loss'])
result = dict(row, seconds=clock(), val_loss=loss, val_bpc=bits)
keep(best, [result])
print(f'''best of step {result["step"]}, on the whole validation part: {bits:.3f} bits/char
finished: {ckpt}, and {out_dir}/run.html for a browser
to see it write: python sample.py --out_dir={out_dir}; with --tex=dream.tex, a paper''')
