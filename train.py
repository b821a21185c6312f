"""
Train a GPT on what prepare.py has written.

    python train.py                                       a run of a minute and a half
    python train.py --dataset=NAME --max_minutes=10       as good as ten minutes make it
    python train.py --init_from=resume                    go on where a run has stopped
    python train.py --init_from=out/ckpt.pt --out_dir=mine --dataset=NAME    finetune
    torchrun --nproc_per_node=2 train.py                  on two processes
"""
import csv, ctypes, io, itertools, json, math, os, shutil, signal, sys, time, zlib
from contextlib import nullcontext, suppress

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder are not noticed
    fcntl = None

from gpt import ACTIVATIONS, GPT, GPTConfig, Muon, POSITIONS, TOKENIZERS
from gpt import checkpoint, fail, generate, limit, load, override, pick_device, write
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
max_iters = 1500  # steps
max_minutes = 0.0  # if above 0, this many minutes in place of max_iters
eval_interval = 150  # steps from one evaluation to the next
# the batch of one step
batch_size = 8  # blocks that go through the model at once
gradient_accumulation_steps = 1  # as many times, one after the other
block_size = 128  # tokens that the model sees at once (T)
# the model
n_layer = 3  # blocks, 0 for the bigram model
n_head = 4  # heads of self-attention (H)
n_embd = 96  # channels (C)
head_dim = 0  # dimension of a head (D), 0 for n_embd / n_head
mlp_dim = 0  # inner dimension of the MLP, 0 for 4 n_embd
dropout = 0.2  # share of channels left out at random, against learning by heart
position = 'rotary'  # rotary, learned or none
norm_weights = False  # weights and biases in layer normalization
activation = 'relu2'  # relu2, relu or gelu
bias = False  # biases in linear maps
tied = False  # one table for tokens and head
value_embeddings = True  # a table for the values of each layer
smear = True  # a share of the token before added to each
# the optimizer
optimizer = 'muon'  # muon (for matrices, adamw for the rest) or adamw
learning_rate = 0.02  # of adamw
matrix_rate = 0.02  # of muon
table_rate = 0.2  # of embeddings, beside muon
beta1 = 0.8  # adamw's momentum
beta2 = 0.99  # adamw's memory of squares
weight_decay = 0.0  # adamw's
grad_clip = 0.0  # the largest norm of the gradient, 0 for any
warmup_iters = 30  # steps in which the rates rise to their value
decay_lr = True  # let the rates fall to 0 in a line
# the machine
seed = 1337  # what step i does depends on the seed and i alone
device = 'auto'  # auto, cpu, cuda, mps
threads = 0  # 0 measures how many are fastest here
compile = False  # torch.compile
# -------------------------------------------------------------------------------------------------
config = override(globals())

def say(text, **how):
    """Print; a screen that is full or gone stops nothing."""
    try:
        print(text, flush=True, **how)
    except OSError:
        sys.stdout = open(os.devnull, 'w')

def hold(folder):
    """The lock of a run's folder: the system lets go of it when the process ends, however."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, '.lock'), 'w')
    except OSError as error:
        fail(f'--out_dir={folder}: {error.strerror}')
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.close()  # or Windows could not move the folder
    except OSError:
        fail(f'{folder}: another train.py is at work there; --out_dir=FOLDER for a run beside it')
    return file

saved, lock = {}, None
if init_from == 'resume':  # the settings of the run, and then the command line once more
    if os.path.isdir(out_dir) and os.environ.get('RANK', '0') == '0':
        lock = hold(out_dir)
    model, tokenizer, saved = load(os.path.join(out_dir, 'last.pt'))
    settings = saved['settings'] if type(saved.get('settings')) is dict else {}
    names = set(settings) & set(config) - {'out_dir', 'init_from'}
    known = {name: settings[name] for name in names}
    sys.argv[1:1] = [f'--{name}={value}' for name, value in known.items()]
    config = override(globals())
    for name in set(known) - {'data_dir', 'max_iters', 'max_minutes', 'eval_interval', 'device',
                              'threads', 'compile'}:
        if config[name] != known[name]:
            fail(f'--{name}={config[name]}: this run has {known[name]}, to its end')
elif init_from != 'scratch':  # weights, tokenizer and shape from there, all else fresh
    model, tokenizer, _ = load(init_from)
    config['block_size'] = block_size = model.config.block_size
    model.config.dropout = dropout
limit(config, max_iters=(0, 10**9), max_minutes=(0, 10**6), eval_interval=(1, 10**9),
      batch_size=(1, 2**14), gradient_accumulation_steps=(1, 2**10), block_size=(1, 2**16),
      n_layer=(0, 1000), n_head=(1, 1000), n_embd=(1, 2**16), head_dim=(0, 2**14),
      mlp_dim=(0, 2**18), dropout=(0, 0.99), position=POSITIONS,
      activation=list(ACTIVATIONS), optimizer=['muon', 'adamw'], learning_rate=(0, 10),
      matrix_rate=(0, 10), table_rate=(0, 10), beta1=(0, 0.9999), beta2=(0, 0.999999),
      weight_decay=(0, 10), grad_clip=(0, 10**6), warmup_iters=(0, 10**9), seed=(0, 2**31),
      threads=(0, 1024))
if head_dim == 0 and n_embd % n_head:
    fail(f'--n_embd={n_embd} does not divide into --n_head={n_head} heads; or set --head_dim')
if position == 'rotary' and (head_dim or n_embd // n_head) % 2:
    fail('rotary positions turn planes: --head_dim must be even (or --position=learned)')

# one process, or one of several that torchrun has started
COLUMNS = ['step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'val_bpc', 'learning_rate']
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
if world > 1:  # each process takes a GPU of its own, or all take the CPU
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if torch.cuda.is_available() else 'cpu'
device = pick_device(device)
if batch_size % world:
    fail(f'--batch_size={batch_size} does not divide into {world} processes')
if world > 1:
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
autocast = torch.autocast('cuda', torch.bfloat16) if device.type == 'cuda' else nullcontext()
torch.set_flush_denormal(True)  # numbers near 1e-40 are slow and say nothing
with suppress(AttributeError, TypeError):  # for a C library that is not glibc
    # Keep memory that was freed: to give it back and fetch it anew took up to a third of a step.
    ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

# ------------------------------------------------------------------------------------------ data

def read(name):
    """The tokens of a part, mapped from disk: (N,) int16, whose bits are those of uint16."""
    path, size, largest = os.path.join(folder, f'{name}.bin'), meta[name]['tokens'], 0
    complete = os.path.getsize(path) == 2 * size
    with open(path, 'rb') as file:
        while complete and (chunk := bytearray(file.read(2**22))):
            chunk = torch.frombuffer(chunk + bytes(len(chunk) % 2), dtype=torch.int16)
            largest = max(largest, (chunk.int() & 0xffff).max().item())
    if not complete or largest >= V:
        fail(f'{path} and meta.json are not of one data set; {again}')
    if size <= block_size:
        fail(f'{path}: {size} tokens are too few for --block_size={block_size}')
    return torch.from_file(path, size=size, dtype=torch.int16)

def blocks(ids, at):
    """Blocks that begin at `at` (B,) and what follows each of their tokens: (B, T) twice."""
    both = ids[at[:, None] + torch.arange(block_size + 1)].long() & 0xffff  # (B, T + 1)
    both = both.to(device)
    return both[:, :-1], both[:, 1:]

def get_batch(i):
    """Step i's blocks: those of this process, as one (B, T) pair for each accumulation step."""
    chance = torch.Generator().manual_seed(seed * 2**32 + i)
    at = torch.randint(len(train) - block_size, (gradient_accumulation_steps, batch_size),
                       generator=chance)
    return [blocks(train, row[rank::world]) for row in at]

folder = os.path.join(data_dir, dataset)
again = f'prepare it (again): python prepare.py --source=... --dataset={dataset}'
try:
    assert all(os.path.isfile(os.path.join(folder, name))
               for name in ('meta.json', 'train.bin', 'val.bin')), 'a file is missing'
    with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
    learned = TOKENIZERS[meta['tokenizer']['kind']](meta['tokenizer']['learned'])
    V = len(learned.tokens)
    sticks = {name: float(meta['yardsticks'][name]) for name in ('uniform', 'unigram', 'bigram')}
    assert all(0 <= bits < 1000 for bits in sticks.values()), 'yardsticks'
    tokens_a_character = meta['val']['tokens'] / meta['val']['characters']
    train, val = read('train'), read('val')
except Exception as error:  # whatever a file that is missing or damaged may cause
    fail(f'{folder}: no data set that can be read ({type(error).__name__}: {error}); {again}')

# ----------------------------------------------------------------------------------------- model

if init_from == 'scratch':
    torch.manual_seed(seed)
    tokenizer = learned
    shape = {name: config[name] for name in GPTConfig.__dataclass_fields__ if name in config}
    try:
        shape = GPTConfig(V, **shape)
    except AssertionError as error:
        fail(f'no such model: {error}')
    if shape.n_params > 2**28:
        fail('a model of more than 2^28 parameters; take a smaller --n_embd or --n_layer')
    model = GPT(shape)
if (learned.kind, learned.learned) != (tokenizer.kind, tokenizer.learned):
    fail(f'{folder} was made with another tokenizer than the model; '
         f'{again} --tokenizer_from={os.path.join(out_dir, "last.pt") if saved else init_from}')
model.to(device)

tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
matrices = [w for name, w in model.blocks.named_parameters()
            if w.dim() == 2 and 'value' not in name]
rest = [w for w in model.parameters() if not any(w is other for other in tables + matrices)]
optimizers = [torch.optim.AdamW(
    [dict(params=rest, lr=learning_rate),
     dict(params=tables, lr=table_rate if optimizer == 'muon' else learning_rate),
     dict(params=[] if optimizer == 'muon' else matrices, lr=learning_rate)],
    betas=(beta1, beta2), weight_decay=weight_decay,
    fused=device.type == 'cpu' and torch.__version__ >= '2.4' or None)]
if optimizer == 'muon' and matrices:
    optimizers.append(Muon(matrices, dict(lr=matrix_rate, momentum=0.95)))
groups = [group for one in optimizers for group in one.param_groups]
rates = [group['lr'] for group in groups]
i, best, seconds, log, losses = 0, math.inf, 0.0, [], []  # the state of a run, beside the weights
if saved:
    try:
        i, best, seconds = saved['step'], saved['best'], saved['seconds']
        log, losses = saved['log'], saved['losses']
        assert type(log) is type(losses) is list and type(i) is int and 0 <= i < 2**31
        assert all(type(row) is list and len(row) == len(COLUMNS) for row in log)
        for x in itertools.chain([best, seconds], losses, *log):
            assert type(x) in (int, float) and 0 <= x < 1e15
        for one, state in zip(optimizers, saved['optimizers']):
            one.load_state_dict({**one.state_dict(), 'state': state['state']})
            for w, kept in one.state.items():
                shapes = {'exp_avg': w.shape, 'exp_avg_sq': w.shape, 'step': ()}
                shapes = {'M': w.shape} if isinstance(one, Muon) else shapes
                assert {name: x.shape for name, x in kept.items()} == shapes
                assert all(x.is_contiguous() for x in kept.values())
        groups = [group for one in optimizers for group in one.param_groups]
    except Exception as error:  # whatever a damaged file may cause
        fail(f'{out_dir}/last.pt: no run that can be resumed ({type(error).__name__}: {error})')
net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
if compile:
    try:
        compiled = torch.compile(net)
        compiled(torch.zeros(1, block_size, dtype=torch.long, device=device))
        net = compiled
    except Exception as error:
        say(f'--compile: not possible here ({type(error).__name__}); going on without')

def learn(x, y, share=1.0):
    """Add the gradient of the mean loss, -log p(y) in nats, times a share, to the weights' own.
    With p = softmax(logits), its derivative by the logits of a token is p - 1 at y, p elsewhere;
    written out it takes fewer passes over memory than F.cross_entropy and its backward."""
    with autocast:
        logits = net(x)  # (B, T, V)
    p, y = logits.detach().softmax(dim=-1, dtype=torch.float), y[..., None]
    loss = share * -p.gather(-1, y).clamp(min=1e-30).log().mean()
    p.scatter_add_(-1, y, torch.full_like(p[..., :1], -1)).mul_(share / y.numel())
    logits.backward(p.to(logits.dtype))
    return loss

def loss_of(x, y):
    """The sum of -log p(y) over all tokens, nats."""
    with autocast:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='sum').item()

@torch.inference_mode()
def evaluate(share):
    """Loss over the validation part, nats a token, block by block; or over a share of the blocks,
    evenly spaced."""
    model.eval()
    at = torch.arange(0, len(val) - block_size, block_size)
    at = at[torch.arange(0, len(at), max(1, 1 / share)).long()]
    total = torch.zeros(2, dtype=torch.float64)
    for some in at[rank::world].split(max(1, 2048 // block_size)) if rank < len(at) else ():
        x, y = blocks(val, some)
        total += torch.tensor([loss_of(x, y), y.numel()])
    tail = val[at[-1] + block_size:].long() & 0xffff  # less than a block
    if share == 1 and rank == 0 and len(tail) > 1:
        tail = tail.to(device)[None]
        total += torch.tensor([loss_of(tail[:, :-1], tail[:, 1:]), len(tail[0]) - 1])
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()

# ----------------------------------------------------------------------------------------- speed

def measure():
    """Try how many threads are fastest here: tokens a second, and threads."""
    x, y = blocks(train, torch.arange(batch_size // world) % (len(train) - block_size))
    cores, fastest = max(1, (os.cpu_count() or 1) // world), (0, 0)
    for n in [threads] if threads else sorted({1, (cores + 1) // 2, cores}):
        torch.set_num_threads(n)
        for _ in range(3):  # the first is slow, whatever n
            began = time.perf_counter()
            with net.no_sync() if world > 1 else nullcontext():  # each by itself
                learn(x, y).item()
            fastest = max(fastest, (world * x.numel() / (time.perf_counter() - began), n))
    model.zero_grad()
    return fastest

try:
    speed, threads = measure()
except (RuntimeError, MemoryError) as error:
    fail(f'a batch does not go through the model here ({str(error)[:100]}); take a smaller '
         '--batch_size, --block_size or --n_embd')
if world > 1:  # all go by the first one's
    both = torch.tensor([speed, threads], dtype=torch.float64)
    dist.broadcast(both, 0)
    speed, threads = both[0].item(), int(both[1])
torch.set_num_threads(threads)

# Reading a token costs a third of learning from it. So that evaluations stay within a tenth of
# the time, they take evenly spaced blocks where the validation part is large; the last one takes
# all of it where that costs a fifth of the run at most.
step_tokens = batch_size * gradient_accumulation_steps * block_size
budget = 60 * max_minutes
all_tokens = budget * speed if budget else max_iters * step_tokens
least = 0 if budget else 2**15  # tokens that take about a second
share = min(1, max(least, min(eval_interval * step_tokens / 10, all_tokens / 20)) / len(val))
last_share = 1 if all_tokens > 1.5 * len(val) else max(share, 0.15 * all_tokens / len(val))

# ------------------------------------------------------------------------------------------ loop

def schedule(i, progress):
    """The share of its rate with which step i is taken: up to 1, then down in a line to 0."""
    return min(1, (i + 1) / (warmup_iters + 1)) * (1 - progress if decay_lr else 1)

def clock():
    """Seconds that the run has taken, those before it was resumed included."""
    return seconds + time.perf_counter() - START

def time_left():
    left = max(0, budget - clock() if budget else (max_iters - i) * step_tokens / speed)
    return f'{left // 60:.0f}m{left % 60:02.0f}s left'

LOSS_SVG = '''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 390" role="img"><style>
 rect { fill: #fff }  text { fill: #333; font: 13px system-ui, sans-serif }
 path { fill: none; stroke: #767676; stroke-linecap: round }  .grid { stroke: #e4e4e4 }
 .dashed { stroke-dasharray: 5 5 }  .training { stroke: #d9730d }  .validation { stroke: #1f6feb }
 .training, .validation { stroke-width: 2.2 }  .dot { stroke-width: 7 }
 .end { text-anchor: end }  .mid { text-anchor: middle }
 @media (prefers-color-scheme: dark) { rect { fill: #111417 }  text { fill: #d6d6d6 }
  path { stroke: #8f8f8f }  .grid { stroke: #2b2f33 }  .training { stroke: #f59b45 }
  .validation { stroke: #6cb0ff } }
</style><title>Bits per character over steps</title><rect width="740" height="390"/>
'''

def loss_svg(log, yardsticks):
    """The picture of a run: bits per character over steps, beside the yardsticks to be beaten."""
    left, right, top, bottom = 52, 580, 40, 340  # the edges of the plot
    last = max(1, log[-1][0])
    curves = {name: [(0, bits), (last, bits)] for name, bits in yardsticks.items()}
    curves['training'] = [(row[0], row[3] * row[5] / (row[4] or 1)) for row in log]
    curves['validation'] = [(row[0], row[5]) for row in log]
    every = [bits for curve in curves.values() for _, bits in curve if math.isfinite(bits)]
    high = min(max(every), 2 * max(yardsticks.values()))  # what is above goes along the edge
    low = min(every) - (high - min(every)) / 20

    def ticks(low, high, least):
        """Some five multiples of 1, 2 or 5 times a power of 10."""
        units = (m * 10.0**e for e in range(-3, 15) for m in (1, 2, 5))
        unit = next(u for u in units if u >= least and high - low <= 6 * u)
        return [n * unit for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
    def x(step):
        return round(left + (right - left) * step / last, 1)
    def y(bits):
        return round(top + (bottom - top) * (high - min(high, bits)) / (high - low or 1), 1)
    def text(x, y, words, kind=''):
        return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>\n'
    def path(points, kind):
        return f'<path d="M{points[0]}L{"L".join(points)}" class="{kind}"/>\n'  # one point: a dot

    out = LOSS_SVG + text(left, 20, 'bits per character')
    for bits in ticks(low, high, 0.001):
        out += path([f'{left} {y(bits)}', f'{right} {y(bits)}'], 'grid')
        out += text(left - 8, y(bits) + 4, f'{bits:.4g}', 'end')
    for step in ticks(0, log[-1][0], 1):
        out += text(x(step), bottom + 20, f'{step:,.0f}', 'mid')
        out += text(x(step), bottom + 37, f'{step * log[-1][1] / last:,.0f}', 'mid')
    out += text(right + 55, bottom + 20, 'steps') + text(right + 55, bottom + 37, 'tokens')
    label = 0
    for n, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: y(item[1][-1][1]))):
        points, end = [f'{x(step)} {y(bits)}' for step, bits in curve], curve[-1][1]
        label = min(max(label + 17, y(end)), bottom - 17 * (len(curves) - 1 - n))  # all apart
        kind = 'dashed' if name in yardsticks else name
        out += path(points, kind) + path(points[-1:], f'{name} dot' * (name == kind))
        out += path([f'{right} {y(end)}', f'{right + 16} {label}'], kind)
        out += text(right + 22, label + 4, f'{name} {end:.2f}')
    return out + '</svg>\n'

def sound(loss):
    """Stop before anything is saved that isn't a number."""
    if not math.isfinite(loss):
        fail(f'step {i}: the loss is {loss}; most likely a rate is too large (--learning_rate, '
             f'--matrix_rate, --table_rate). {out_dir}/ckpt.pt is the last good model')
    return loss

def keep(*names):
    """Write checkpoints and the log, all or none; if the disk doesn't let it, say so and go on."""
    sound(sum(w.sum().item() for w in model.parameters()))
    state = checkpoint(model, tokenizer, settings={**config, 'threads': threads}, step=i, log=log,
                       losses=losses, best=best, seconds=clock(),
                       optimizers=[one.state_dict() for one in optimizers])
    table = io.StringIO()
    csv.writer(table).writerows([COLUMNS, *log])
    files = {'log.csv': table.getvalue().encode(), 'loss.svg': loss_svg(log, sticks).encode(),
             **dict.fromkeys(names, state)}
    try:
        os.makedirs(out_dir, exist_ok=True)
        write({os.path.join(out_dir, name): data for name, data in files.items()})
        return True
    except OSError as error:
        say(f'not saved ({error.filename2 or error.filename or out_dir}: {error.strerror}); what '
            'was saved before is whole', file=sys.stderr)

def report():
    """Evaluate, print a line and a few words, keep the best model and the newest state."""
    global best
    val_loss = sound(evaluate(share))
    better, best = val_loss < best, min(best, val_loss)
    if last and last_share > share:
        val_loss = evaluate(last_share)
    if rank:
        return True
    part = last_share if last else share
    bits = val_loss / math.log(2) * tokens_a_character
    train_loss = sum(losses) / len(losses) if losses else val_loss
    log.append([i, i * step_tokens, round(clock(), 2), train_loss, val_loss, bits,
                groups[0]['lr']])
    say(f'step {i}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, '
        f'{bits:.2f} bits/char, {speed:.0f} tok/s, {time_left()}'
        + (f' (on {part:.0%} of the validation part)' if part < 1 else ''))
    model.eval()
    words = generate(model, torch.tensor([tokenizer.encode('\n')], device=device), 32,
                     generator=torch.Generator(device).manual_seed(seed))
    words = ''.join(tokenizer.stream(int(word) for word in words))
    say('    ' + ' '.join(words.split()))
    model.train()
    losses.clear()
    return keep('last.pt', *['ckpt.pt'] * better)

def on_signal(number, frame):
    """The first time: end after this step. The second time: at once."""
    global stopping
    if stopping:
        os._exit(128 + number)
    stopping = number

if rank == 0:
    lock = lock or hold(out_dir)
    if init_from != 'resume' and any(os.path.exists(os.path.join(out_dir, name))
                                     for name in ('last.pt', 'ckpt.pt')):
        names = (f'{os.path.normpath(out_dir)}.{n}' for n in itertools.count(1))
        aside = next(name for name in names if not os.path.exists(name))
        try:
            os.rename(out_dir, aside)
        except OSError as error:
            fail(f'{out_dir} cannot become {aside}: {error.strerror}')
        say(f'the run that was in {out_dir} is now in {aside}')
        lock = hold(out_dir)
    say(f'{model.config.n_params:,} parameters, {len(train):,} tokens to learn from, '
        f'{step_tokens:,} in a step; {device}, {threads} thread{"s" * (threads > 1)}'
        + (f'; resumed at step {i}' if i else ''))

stopping, kept = 0, True
signal.signal(getattr(signal, 'SIGPIPE', signal.SIGINT), signal.SIG_IGN)
signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
while True:
    if budget:  # less the time of the last evaluation
        until = budget - 0.4 * (last_share + share * (share < last_share)) * len(val) / speed
        progress = min(1, clock() / max(0.01, until))
    else:
        progress = i / max_iters if max_iters else 1
    if world > 1:  # all see the clock and the signals of all
        both = torch.tensor([progress, stopping], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        progress, stopping = both[0].item(), max(stopping, int(both[1]))
    last = progress >= 1
    if (last or i % eval_interval == 0) and not (log and log[-1][0] == i):
        kept = report()
    if last or stopping:
        break

    began = time.perf_counter()
    for group, rate in zip(groups, rates):
        group['lr'] = rate * schedule(i, progress)
    torch.manual_seed(seed * 2**32 + i * world + rank)  # for dropout
    loss = sum(learn(x, y, 1 / gradient_accumulation_steps) for x, y in get_batch(i))
    if world > 1:
        dist.all_reduce(loss)
    losses.append(sound(loss.item() / world))
    if grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for one in optimizers:
        one.step()
        one.zero_grad()
    i += 1
    speed += (step_tokens / (time.perf_counter() - began) - speed) / min(i, 20)
    if rank == 0 and sys.stdout.isatty():  # one line, rewritten in place, in any window
        width = shutil.get_terminal_size().columns - 1
        line = (f'step {i} [{"=" * int(20 * progress):20}] loss {losses[-1]:.3f}, {time_left()}, '
                f'{speed:.0f} tok/s')
        say(line[:width].ljust(width), end='\r')

if stopping and rank == 0:
    kept = keep('last.pt')
if world > 1:
    dist.barrier()  # until the first has saved
    dist.destroy_process_group()
if rank == 0:
    if stopping:
        say(f'\nstopped{" and saved" * bool(kept)} at step {i}; to go on: '
            f'python train.py --init_from=resume --out_dir={out_dir}')
    else:
        say(f'finished; to see it write: python sample.py --out_dir={out_dir}')
    lock.close()
if stopping:
    sys.exit(128 + stopping)
if not kept:
    fail(f'the end of the run could not be saved in {out_dir}')
