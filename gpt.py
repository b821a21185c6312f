"""A GPT in one file: tokenizers, the causal transformer, generation, the optimizer.
A letter has one meaning throughout; a comment like (B, T, C) is the shape of what stands before.
    B batch, texts read side by side      V vocabulary size
    T time, tokens of a text              H heads
    C channels, the width of the model    D dimension of a head, d_k in [1]
[1] Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762
[2] before torch is loaded: threads that have waited for a while leave their core to others
"""
import argparse, codecs, functools, io, math, os, pathlib, pickletools, re, signal, sys
import warnings, zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
os.environ.update({'OMP_WAIT_POLICY': 'PASSIVE', 'GOMP_SPINCOUNT': '10000', **os.environ})  # [2]
warnings.filterwarnings('ignore', 'Failed to initialize NumPy')  # none is needed
import torch
import torch.nn as nn
import torch.nn.functional as F
# -- Tokens: a text becomes integers 0 ... V-1, and comes back from them --------------------------
MAX_VOCAB, UNKNOWN = 2**16, '\ufffd'  # a token is stored in 16 bits; what was never learned

class CharTokenizer:
    r"""One token a character; `learn` keeps the most frequent ones.

    >>> t = CharTokenizer.learn('abracadabra')
    >>> t.encode('cab'), t.decode([2, 0, 1]), t.decode(t.encode('cat'))
    ([2, 0, 1], 'cab', 'ca\ufffd')
    """
    kind, cut = 'char', staticmethod(iter)
    def __init__(self, learned):
        assert type(learned) is list and len(learned) <= MAX_VOCAB, 'no list of tokens'
        self.learned, self.ids = learned, {unit: i for i, unit in enumerate(learned)}
        self.tokens, self.unknown = [unit[:64].encode() for unit in learned], self.ids[UNKNOWN]

    @classmethod
    def learn(cls, text, vocab_size=MAX_VOCAB):
        units = {unit for unit, _ in Counter(cls.cut(text)).most_common(vocab_size - 1)}
        return cls(sorted(units - {UNKNOWN}) + [UNKNOWN])

    def encode(self, text):
        return [self.ids.get(unit, self.unknown) for unit in self.cut(text)]

    def decode(self, ids):
        return ''.join(self.stream(ids))

    def stream(self, ids):
        """Decode ids as they come, holding a character back until its last byte is there."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            yield decoder.decode(self.tokens[i])
        yield decoder.decode(b'', final=True)

# LaTeX in pieces of at most 64 characters: a control word, a control symbol, letters, a digit,
# punctuation, line ends with the indentation after them, other white space.
PIECE = re.compile(r'\\[A-Za-z@]{1,63}|\\[^\nA-Za-z]?| ?[^\W\d_]{1,63}|\d'
                   r'| ?(?:[^\w\s\\]{1,63}|_)|\n{1,8}[ \t]{0,56}|\s')

def pieces(text):
    """The pieces of a text in order; joined they are the text."""
    for start in range(0, len(text), 2**16):  # so that few of them are in memory
        yield from PIECE.findall(text, start, start + 2**16)

class WordTokenizer(CharTokenizer):
    """One token a piece of LaTeX."""
    kind, cut = 'word', staticmethod(pieces)

class BPETokenizer(CharTokenizer):
    """Byte pairs (arXiv:1508.07909): start from the 256 bytes, and again and again make a token
    of the most frequent pair of neighbours within a piece. Nothing is ever unknown.

    >>> t = BPETokenizer.learn('aaabdaaabac', 256 + 3)
    >>> t.tokens[256:], [t.decode([i]) for i in t.encode('aaabdaaabac')]
    ([b'aa', b'ab', b'aaab'], ['aaab', 'd', 'aaab', 'a', 'c'])
    """
    kind = 'bpe'  # it works on strings in which chr(i) is token i, at first a byte
    word = staticmethod(lambda piece: piece.encode('utf-8', 'replace').decode('latin-1'))
    def __init__(self, learned):
        assert type(learned) is list and len(learned) <= MAX_VOCAB - 256, 'no list of merges'
        self.learned = learned
        self.ids = {(chr(a), chr(b)): 256 + i for i, (a, b) in enumerate(learned)}
        self.tokens = [bytes([byte]) for byte in range(256)]
        for a, b in learned:
            self.tokens.append((self.tokens[a] + self.tokens[b])[:256])  # none learned is longer
        self.merge = functools.lru_cache(MAX_VOCAB)(self.merge)

    @classmethod
    def learn(cls, text, vocab_size=MAX_VOCAB):
        counts = Counter(map(cls.word, pieces(text)))
        words, times, merges = list(counts), list(counts.values()), []
        total, where = Counter(), defaultdict(set)  # of each pair: how often, in which words
        def count(w):
            for pair in zip(words[w], words[w][1:]):
                total[pair] += times[w]
                where[pair].add(w)
        for w in range(len(words)):
            count(w)
        while (len(merges) < vocab_size - 256  # and of equal pairs take the one seen first
               and total[(best := max(total, key=total.get, default=None))] > 1):
            merges.append([ord(token) for token in best])
            for w in where.pop(best):
                old = words[w]
                words[w] = old.replace(''.join(best), chr(255 + len(merges)))
                count(w)
                for pair in zip(old, old[1:]):
                    total[pair] -= times[w]
                    if not total[pair]:
                        del total[pair]
        return cls(merges)

    def merge(self, piece):
        """The ids of one piece: pairs merge in the order in which they were learned."""
        word = self.word(piece)
        while known := [(self.ids[p], p) for p in zip(word, word[1:]) if p in self.ids]:
            new, pair = min(known)
            word = word.replace(''.join(pair), chr(new))
        return list(map(ord, word))

    def encode(self, text):
        return [i for piece in pieces(text) for i in self.merge(piece)]

TOKENIZERS = {'char': CharTokenizer, 'word': WordTokenizer, 'bpe': BPETokenizer}
# -- The model ------------------------------------------------------------------------------------
ACTIVATIONS = {'relu': F.relu, 'gelu': F.gelu, 'relu2': lambda x: F.relu(x).square()}
POSITIONS = ['rotary', 'learned', 'none']
@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    head_dim: int = 0  # 0: n_embd / n_head
    mlp_dim: int = 0  # 0: 4 n_embd
    dropout: float = 0.0
    position: str = 'rotary'
    norm_weights: bool = False
    activation: str = 'relu2'
    bias: bool = False
    tied: bool = False
    value_embeddings: bool = True
    smear: bool = True

    def __post_init__(self):
        for name, kind in type(self).__annotations__.items():
            value = getattr(self, name)
            assert type(value) in (kind, kind is float and int), name
            assert kind is str or 0 <= value <= {int: 2**18, float: 0.9999, bool: 1}[kind], name
        self.head_dim = self.head_dim or self.n_embd // max(1, self.n_head)
        self.mlp_dim = self.mlp_dim or 4 * self.n_embd
        assert min(self.vocab_size, self.n_embd, self.n_head) > 0 and self.n_layer <= 1000, 'sizes'
        assert 0 < self.block_size * self.head_dim <= 2**26, 'block_size x head_dim out of range'
        assert self.activation in ACTIVATIONS and self.position in POSITIONS[self.head_dim % 2:]

    @property
    def n_params(self):
        """The exact number of parameters."""
        V, C, M, HD = self.vocab_size, self.n_embd, self.mlp_dim, self.n_head * self.head_dim
        b, norm = self.bias, 2 * C * self.norm_weights
        block = 2 * norm + 4 * C * HD + 2 * C * M + (2 * C + M) * b + V * HD * self.value_embeddings
        once = C * self.smear + self.block_size * C * (self.position == 'learned')
        ends = V * C * (2 - self.tied) + V * b + norm
        return ends + self.n_layer * block + once * (self.n_layer > 0)

def attention(q, k, v):
    """Equation (1) of [1], softmax(Q K^T / sqrt(d_k)) V, causal: a query takes a mean of the values
    of its past, weighted by how well keys fit. To be read: the model runs torch's fused version."""
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    weights = (scores + torch.full_like(scores, -math.inf).triu(1)).softmax(dim=-1)  # 0 ahead
    return weights @ v  # (B, H, T, D)

def rotation(T, D, base=10_000):
    """cos and sin, (T, D/2) each, of the angles t / base^(2i/D) (RoFormer, arXiv:2104.09864)."""
    angle = torch.outer(torch.arange(T), base ** (-torch.arange(0, D, 2) / D))
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn x (..., T, D) in the planes (i, i + D/2); then <q at s, k at t> knows s - t alone."""
    a, b = x.chunk(2, dim=-1)  # (..., T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

class SelfAttention(nn.Module):
    """H heads side by side; the sum of their outputs is one product with all of W_O."""
    def __init__(self, config):
        super().__init__()
        self.config, C, HD = config, config.n_embd, config.n_head * config.head_dim
        self.qkv = nn.Linear(C, 3 * HD, bias=False)  # W_Q, W_K, W_V of all heads
        self.out = nn.Linear(HD, C, bias=config.bias)  # W_O
        if config.value_embeddings:  # what a token says wherever it stands (arXiv:2410.17897)
            self.value = nn.Embedding(config.vocab_size, HD)

    def forward(self, x, idx, turn, cache):
        c, (B, T, _) = self.config, x.shape
        q, k, v = qkv = self.qkv(x).view(B, T, 3, c.n_head, c.head_dim).permute(2, 0, 3, 1, 4)
        if c.value_embeddings:
            v = v + self.value(idx).view(B, T, c.n_head, c.head_dim).transpose(1, 2)
        if c.position == 'rotary':
            q, k = rotate(qkv[:2], *turn)  # (2, B, H, T, D)
        if self in cache:  # room for all keys and values, of which those of t tokens are there
            t, room = cache['length'] - T, cache[self]  # (2, B, H, block_size, D)
            room[:, :, :, t:t + T] = torch.stack((k, v))
            k, v = room[:, :, :, :t + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

class Block(nn.Module):
    """Tokens exchange what they know, then each thinks it over by itself, in an MLP: up to mlp_dim,
    an activation (relu2: arXiv:2109.08668), down again. Both add to the stream x."""
    def __init__(self, config):
        super().__init__()
        self.config, C, M = config, config.n_embd, config.mlp_dim
        self.norm1 = nn.LayerNorm(C, elementwise_affine=config.norm_weights)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(C, elementwise_affine=config.norm_weights)
        self.up, self.down = nn.Linear(C, M, config.bias), nn.Linear(M, C, config.bias)

    def forward(self, x, idx, turn, cache):
        p, activation = self.config.dropout, ACTIVATIONS[self.config.activation]
        x = x + F.dropout(self.attention(self.norm1(x), idx, turn, cache), p, self.training)
        y = self.down(activation(self.up(self.norm2(x))))  # (B, T, mlp_dim) and back
        return x + F.dropout(y, p, self.training)  # (B, T, C)

class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V). n_layer=0 is the bigram model, two tables' product."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.Embedding(c.vocab_size, c.n_embd)
        if c.n_layer and c.position == 'learned':
            self.place = nn.Embedding(c.block_size, c.n_embd)
        if c.n_layer and c.smear:
            self.smear = nn.Parameter(torch.zeros(c.n_embd))
        self.register_buffer('turn', torch.stack(rotation(c.block_size, c.head_dim)), False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, elementwise_affine=c.norm_weights)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=c.bias)
        for name, p in self.named_parameters():
            if 'norm' not in name:  # its weights begin at 1, vectors at 0
                nn.init.normal_(p, std=0.02 * (p.dim() > 1))
        if c.tied:
            self.head.weight = self.token.weight

    def hidden(self, idx, cache):
        """What the head reads, (B, T, C). With rooms in the cache, as in generate, calls go on."""
        c, T, x, t = self.config, idx.size(1), self.token(idx), cache.get('length', 0)
        if c.n_layer == 0:
            return x
        cache['length'], last = t + T, x[:, -1:]  # (B, 1, C)
        if c.smear:  # of each channel, a share of the token before
            x = x + self.smear * torch.cat((cache.get('last', 0 * last), x[:, :-1]), dim=1)
            cache['last'] = last
        if c.position == 'learned':
            x = x + self.place.weight[t:t + T]
        x = F.dropout(x, c.dropout, self.training)
        for block in self.blocks:
            x = block(x, idx, self.turn[:, t:t + T], cache)
        return self.norm(x)

    def forward(self, idx):
        return self.head(self.hidden(idx, {}))
# -- Generation -----------------------------------------------------------------------------------
def next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw from softmax(logits / temperature), (B, V) to (B, 1); temperature 0 takes the largest.
    top_k keeps the k likeliest (0: all), top_p the fewest that suffice (arXiv:1904.09751)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1, keepdim=True)
    p = (logits.float() / temperature).nan_to_num().softmax(dim=-1)
    if top_k or top_p < 1:
        best = p.sort(dim=-1, descending=True).values[:, :top_k or None]
        enough = (best.cumsum(dim=-1) - best < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        p = p.where(p >= best.gather(1, enough - 1), 0)
    return torch.multinomial(p, 1, generator=generator)

@torch.inference_mode()
def generate(model, idx, max_new_tokens, **how):
    """Yield the tokens (B,) that follow idx (B, T >= 1); `how` is next_token's. A full window
    begins again with its last half: on average a token costs the same however long the text."""
    c, window = model.config, model.config.block_size
    rooms = model.token.weight.new_empty(c.n_layer, 2, len(idx), c.n_head, window, c.head_dim)
    empty = dict(zip((block.attention for block in model.blocks), rooms))
    cache, seen, new = dict(empty), idx[:, -window:], idx[:, -window:]
    for _ in range(max_new_tokens):
        if cache.get('length', 0) + new.size(1) > window:
            new, cache = seen[:, -max(1, window // 2):], dict(empty)
        new = next_token(model.head(model.hidden(new, cache)[:, -1]), **how)  # (B, 1)
        seen = torch.cat((seen, new), dim=1)[:, -window:]
        yield new[:, 0]
# -- The optimizer --------------------------------------------------------------------------------
def orthogonalize(G, steps=3):
    """Newton-Schulz, from U S V^T towards U V^T, for each matrix of a stack (N, n, m).
    X <- a X + b X X^T X + c (X X^T)^2 X takes singular values s to a s + b s^3 + c s^5. With these
    a, b, c (found by trying: Jordan et al. 2024, kellerjordan.github.io/posts/muon) five steps take
    all but the smallest to 0.7 ... 1.2, and three do as well for learning."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.mT if G.size(-2) > G.size(-1) else G  # so that X X^T is the smaller product
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now s <= 1
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(-2) > G.size(-1) else X

class Muon(torch.optim.Optimizer):
    """For matrices W (n, m) with gradient G: Muon(matrices, dict(lr=0.02, momentum=0.95)).
    M <- mu M + (1 - mu) G,   W <- W - lr sqrt(max(1, n/m)) orthogonalize(mu M + (1 - mu) G)"""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu, stacks = group['lr'], group['momentum'], defaultdict(list)
            for W in group['params']:
                M = self.state[W].setdefault('M', torch.zeros_like(W)).lerp_(W.grad, 1 - mu)
                stacks[W.shape].append((W, W.grad.lerp(M, mu)))
            for (n, m), stack in stacks.items():  # matrices of one shape go through as one stack
                for (W, _), X in zip(stack, orthogonalize(torch.stack([N for _, N in stack]))):
                    W.add_(X, alpha=-lr * max(1, n / m) ** 0.5)
# == What the scripts share and what isn't mathematics ============================================
def fail(message):
    """End with one line that says what to do."""
    print(' '.join(message.split()), file=sys.stderr)
    sys.exit(2)

def override(settings):
    """Let the command line set the globals that a script has assigned so far; returns a dict."""
    def boolean(text):
        return ('true', '1', 'yes', 'false', '0', 'no').index(text.lower()) < 3
    with open(settings['__file__'], encoding='utf-8') as file:
        comments = dict(re.findall(r'^(\w+) = .*?  # (.*)$', file.read(), re.MULTILINE))
    parser = argparse.ArgumentParser(description=settings['__doc__'], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f'{message}; --help lists the settings')
    signal.signal(getattr(signal, 'SIGPIPE', signal.SIGINT), signal.SIG_DFL)  # as in `| head`
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C: no traceback
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # nor where there is no screen,
    sys.stdout.reconfigure(errors='backslashreplace')  # nor for what it can't show
    for name, value in list(settings.items()):
        if name[0].islower() and type(value) in (bool, int, float, str):
            parser.add_argument(f'--{name}', default=value, metavar=repr(value),
                                type=boolean if type(value) is bool else type(value),
                                help=comments.get(name, '').replace('%', '%%'))
    if [] in (config := vars(parser.parse_args())).values():
        parser.error('-- is no value')
    settings.update(config)
    return config

def limit(config, **limits):
    """Each setting named within a pair of numbers, or in a list of words."""
    for name, allowed in limits.items():
        value, words = config[name], isinstance(allowed, list)
        if value not in allowed if words else not allowed[0] <= value <= allowed[1]:
            fail(f'--{name}={value}: wanted ' + (', ' if words else ' to ').join(map(str, allowed)))

def pick_device(name):
    """auto takes cuda, else mps, else cpu."""
    auto = ('cuda' if torch.cuda.is_available() else
            'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        place = torch.zeros(1, device=auto if name == 'auto' else name)
        return place.item() or place.device  # 0.0, where a tensor can hold it
    except Exception:  # many kinds
        fail(f'--device={name} is not available here; try --device=auto')

def write(files):
    """Replace files (a dict of path: bytes), each whole or not at all."""
    try:
        for path, data in files.items():
            with open(f'{path}.tmp', 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(f'{path}.tmp', path)
    finally:
        for path in files:  # after a failure: leave nothing half
            pathlib.Path(f'{path}.tmp').unlink(missing_ok=True)

def checkpoint(model, tokenizer, **more):
    """The bytes of a checkpoint: tensors, numbers, strings, lists and dicts, nothing that runs."""
    file = io.BytesIO()
    torch.save(dict(version=2, config=vars(model.config), model=model.state_dict(),
                    tokenizer=[tokenizer.kind, tokenizer.learned], **more), file)
    return file.getvalue()

MAY_CALL = {'collections OrderedDict', 'torch._utils _rebuild_tensor_v2', 'torch FloatStorage'}
def load(path):
    """Read a checkpoint: model, tokenizer, and all that was saved. Nothing in it is run."""
    try:
        assert os.path.isfile(path), 'no such file'
        data = pathlib.Path(path).read_bytes()
        parts, size = zipfile.ZipFile(io.BytesIO(data)), len(data)
        assert sum(part.file_size for part in parts.infolist()) <= size and not parts.testzip()
        assert data[:2] == b'PK' and b'constants.pkl' not in data  # which torch 2.5 would run
        assert {name for part in parts.namelist() if part.endswith('.pkl') for op, name, _ in
                pickletools.genops(parts.read(part)) if op.name == 'GLOBAL'} <= MAY_CALL
        saved = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
        (kind, learned), config = saved['tokenizer'], saved['version'] == 2 and saved['config']
        assert 4 * (config := GPTConfig(**config)).n_params <= size, 'too few weights'
        model, tokenizer = GPT(config), TOKENIZERS[kind](learned)
        model.load_state_dict(saved['model'])
        assert len(tokenizer.tokens) == config.vocab_size, 'tokens and weights do not fit'
        assert all(w.isfinite().all() for w in model.parameters()), 'weights that are no numbers'
        return model, tokenizer, saved
    except Exception as error:  # whatever a file that is missing, damaged or hostile may cause
        fail(f'{path}: no checkpoint that can be read ({str(error)[:150] or type(error).__name__})')
