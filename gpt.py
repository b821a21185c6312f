"""A GPT in one file: tokenizers, the causal transformer, generation, the optimizer.

A comment like (B, T, C) is the shape of what stands before it.

    B   batch: texts that are read side by side     H   heads
    T   time: tokens of a text                      D   dimension of a head
    C   channels: the width of the model            M   width of the MLP
    V   vocabulary: how many kinds of tokens        L   layers, which are called blocks

What [1] writes, and where it stands here:

    Q, K, V in equation (1)     q, k, v in `attention` and `SelfAttention`, (B, H, T, D)
    W_Q, W_K, W_V of all heads  `SelfAttention.query`, `.key`, `.value`, (H D, C) each
    W_O                         `SelfAttention.out`, (C, H D)
    h, d_model, d_k             H or `n_head`, C or `n_embd`, D or `head_dim`
    feed-forward network, d_ff  `MLP`, M or `mlp_dim`
    N layers                    `n_layer` blocks

[1] Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762
"""
import argparse
import codecs
import functools
import json
import math
import os
import re
import signal
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Before torch is loaded: a thread that has waited for a while leaves its core to others.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
warnings.filterwarnings('ignore', 'Failed to initialize NumPy')  # none is needed
import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
# Tokens: a text becomes integers 0 ... V-1, and comes back from them

MAX_VOCAB = 2**16  # a token is stored in 16 bits
UNKNOWN = '\ufffd'  # stands for what was never learned

# The pieces of LaTeX. None is longer than 64 characters, and joined they are the text.
PIECE = re.compile(r'''(?x)
    \\ [A-Za-z@]{1,63}              # a control word, \alpha
  | \\ [^\nA-Za-z]?                 # a control symbol, \{
  | [ ]? [^\W\d_]{1,63}             # letters, with the blank before them
  | \d                              # one digit
  | [ ]? (?: [^\w\s\\]{1,63} | _ )  # punctuation, with the blank before it
  | \n{1,8} [ \t]{0,56}             # line ends, with the indentation after them
  | \s                              # other white space
''')


def pieces(text):
    """Yield the pieces of a text in order.

    >>> list(pieces(r'Let $\\alpha_1>0$.'))
    ['Let', ' $', '\\\\alpha', '_', '1', '>', '0', '$.']
    """
    for match in PIECE.finditer(text):
        yield match[0]


class CharTokenizer:
    r"""One token a character, the most frequent ones. Text of these comes back exactly.

    >>> t = CharTokenizer.learn('abracadabra')
    >>> t.encode('cab'), t.decode([2, 0, 1]), t.decode(t.encode('cat'))
    ([2, 0, 1], 'cab', 'ca\ufffd')
    """
    kind = 'char'
    split = staticmethod(iter)  # a text into the units that become tokens

    def __init__(self, learned):
        self.learned = learned  # all that a checkpoint needs to know
        self.tokens = [unit.encode() for unit in learned]  # the bytes of each token
        self.ids = {unit: i for i, unit in enumerate(learned)}
        self.unknown = self.ids[UNKNOWN]

    @classmethod
    def learn(cls, text, vocab_size=MAX_VOCAB):
        units = dict(Counter(cls.split(text)).most_common(vocab_size - 1))
        return cls(sorted({*units, UNKNOWN}))

    def encode(self, text):
        return [self.ids.get(unit, self.unknown) for unit in self.split(text)]

    def decode(self, ids):
        return ''.join(self.stream(ids))

    def stream(self, ids):
        """Decode ids as they come, holding a character back until its last byte is there."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            yield decoder.decode(self.tokens[i])
        yield decoder.decode(b'', final=True)


class WordTokenizer(CharTokenizer):
    """One token a piece of LaTeX, the most frequent ones."""
    kind = 'word'
    split = staticmethod(pieces)


def as_bytes(piece):
    """A piece as a string in which chr(i) is byte i."""
    return piece.encode('utf-8', 'replace').decode('latin-1')


def pairs(word):
    """What stands side by side in a string: abc has ab and bc."""
    return map(''.join, zip(word, word[1:]))


class BPETokenizer(CharTokenizer):
    """Byte pairs (arXiv:1508.07909): the first 256 tokens are the bytes, and each further one
    joins the two tokens that most often stand side by side within a piece. Nothing is unknown.

    >>> t = BPETokenizer.learn('aaabdaaabac', 256 + 3)
    >>> t.tokens[256:], [t.decode([i]) for i in t.encode('aaabdaaabac')]
    ([b'aa', b'ab', b'aaab'], ['aaab', 'd', 'aaab', 'a', 'c'])

    While it merges, a piece is a string in which chr(i) stands for token i: so str.replace
    merges a pair wherever it stands. Only pieces that have the pair are counted anew.
    """
    kind = 'bpe'

    def __init__(self, learned):
        self.learned = learned  # pairs of tokens, in the order in which they were merged
        self.ids = {}  # of each pair what it becomes
        self.tokens = [bytes([byte]) for byte in range(256)]
        for a, b in learned:
            self.ids[chr(a) + chr(b)] = len(self.tokens)
            self.tokens.append(self.tokens[a] + self.tokens[b])
            assert len(self.tokens[-1]) <= 256, 'a token that is longer than any piece'
        self.merge = functools.cache(self.merge)  # most pieces come often

    @classmethod
    def learn(cls, text, vocab_size=MAX_VOCAB):
        times = Counter(map(as_bytes, pieces(text)))  # how often each piece stands in the text
        total = Counter()  # and each pair
        merges = []

        def count(word, n):
            for pair in pairs(word):
                total[pair] += n

        for word, n in times.items():
            count(word, n)
        for new in range(256, vocab_size):
            best = max(total, key=total.get, default=None)  # of equal ones the first that was seen
            if total[best] < 2:
                break
            merges.append([*map(ord, best)])
            for word in [word for word in times if best in word]:
                n = times.pop(word)
                merged = word.replace(best, chr(new))
                times[merged] = n  # it is new: no other piece has the same bytes
                count(word, -n)
                count(merged, n)
        return cls(merges)

    def merge(self, piece):
        """The ids of one piece: pairs merge in the order in which they were learned."""
        word = as_bytes(piece)
        while known := self.ids.keys() & pairs(word):
            first = min(known, key=self.ids.get)
            word = word.replace(first, chr(self.ids[first]))
        return [*map(ord, word)]

    def encode(self, text):
        return [i for piece in pieces(text) for i in self.merge(piece)]


TOKENIZERS = {'char': CharTokenizer, 'word': WordTokenizer, 'bpe': BPETokenizer}

# -------------------------------------------------------------------------------------------------
# The model: each token becomes a vector, blocks let the vectors exchange what they know, and the
# head reads from each of them what comes next

POSITIONS = ['rotary', 'learned', 'none']
ACTIVATIONS = {
    'relu': F.relu,
    'gelu': F.gelu,
    'relu2': lambda x: F.relu(x).square(),  # arXiv:2109.08668
}


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
        assert min(self.block_size, self.n_head, self.n_embd) > 0, 'sizes are above 0'
        assert self.head_dim or self.n_embd % self.n_head == 0, (
            f'n_embd={self.n_embd} is no multiple of n_head={self.n_head}; or set head_dim')
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.mlp_dim = self.mlp_dim or 4 * self.n_embd
        if self.n_layer == 0:  # the bigram model: nothing in it knows of other tokens
            self.position, self.smear = 'none', False
        assert self.position != 'rotary' or self.head_dim % 2 == 0, (
            'rotary positions turn planes: head_dim is even, or take position=learned')

    @property
    def n_params(self):
        """The exact number of parameters, by counting them."""
        return sum(w.numel() for w in GPT(self).parameters())


def attention_weights(q, k, is_causal=False):
    """softmax(Q K^T / sqrt(d_k)) of equation (1) in [1]: (B, H, T, D) twice to (B, H, T, T).

    Row t says how much token t looks at each token. If it is causal, it looks at none after t.
    Why the root: if entries of q and k are independent of variance 1, q k^T has variance d_k, and
    the softmax of such large numbers is nearly 0 or 1 and hardly learns.
    """
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, T, T)
    if is_causal:
        scores = scores + torch.full_like(scores, -math.inf).triu(1)  # above the diagonal
    return scores.softmax(dim=-1)


def attention(q, k, v, is_causal=False):
    """Equation (1) in [1]: each token takes a mean of the values, (B, H, T, D) to the same."""
    return attention_weights(q, k, is_causal) @ v


# What the model runs: the same function by torch, which need not make the (T, T) matrix whole.
fused_attention = F.scaled_dot_product_attention


def rotate(x, S):
    """Turn the vectors x (..., T, D) of the last T of S tokens by angles that grow with their
    position s: by s / 10,000^(2i/D) in the plane of channels i and i + D/2. The inner product of a
    query at s and a key at t then depends on s - t alone. From RoFormer, arXiv:2104.09864.
    """
    T, D = x.shape[-2:]
    place = torch.arange(S - T, S, device=x.device)
    speed = 10_000 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D/2,)
    angle = torch.outer(place, speed)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)  # (..., T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Cache:
    """What generation keeps of the tokens so far, so that a new one costs one token's work."""

    def __init__(self):
        self.length = 0  # tokens so far
        self.past = {}  # their vectors, and of each layer their keys and values, by name

    def append(self, name, x):
        """Put x (..., T, channels) behind what is kept by this name; return all of it."""
        if name in self.past:
            x = torch.cat((self.past[name], x), dim=-2)
        self.past[name] = x
        return x


def smeared(x, share):
    """Add to each of x (..., T, channels) a share of the one before it: x_t + share x_(t-1), where
    the share is learned for each channel. So the first block sees pairs of tokens, and a query can
    look for the token that follows one it knows. Smeared keys are an idea of arXiv:2209.11895.
    """
    # Padding moves each on by one place. Before the first stands 0.
    return x + share * F.pad(x, (0, 0, 1, -1))


class SelfAttention(nn.Module):
    """H heads side by side. The sum of what they say is one product with all of W_O."""

    def __init__(self, config, layer):
        super().__init__()
        C, HD = config.n_embd, config.n_head * config.head_dim
        self.config, self.layer = config, layer
        self.query = nn.Linear(C, HD, bias=False)
        self.key = nn.Linear(C, HD, bias=False)
        self.value = nn.Linear(C, HD, bias=False)
        self.out = nn.Linear(HD, C, bias=config.bias)
        if config.value_embeddings:
            # What a token says wherever it stands. From modded-nanogpt (Koszarsky 2024), after an
            # idea in arXiv:2410.17897, which adds the first layer's values to those of later ones.
            self.value_table = nn.Embedding(config.vocab_size, HD)
        if config.smear:
            self.smear = nn.Parameter(torch.zeros(HD))  # of keys

    def forward(self, x, idx, cache):
        c = self.config
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, H D) each
        if c.value_embeddings:
            v = v + self.value_table(idx)
        # (B, S, H D), of all S tokens so far. Keys are kept as they are: the next needs the last.
        k = cache.append(f'keys {self.layer}', k)
        v = cache.append(f'values {self.layer}', v)
        if c.smear:
            k = smeared(k, self.smear)
        q, k, v = (y.unflatten(-1, (c.n_head, -1)).transpose(1, 2)
                   for y in (q, k, v))  # (B, H, T, D), and twice (B, H, S, D)
        if c.position == 'rotary':
            S = k.size(2)
            q, k = rotate(q, S), rotate(k, S)
        # A single new token needs no mask: all that is there is its past.
        y = fused_attention(q, k, v, is_causal=q.size(2) > 1)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        return self.out(y)  # (B, T, C)


class MLP(nn.Module):
    """Each token by itself: up to M channels, an activation, and down again."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.mlp_dim, bias=config.bias)
        self.down = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))  # (B, T, C) to (B, T, M) and back


class Block(nn.Module):
    """Tokens exchange what they know, then each thinks it over. Both add to the stream x."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.norm1 = nn.LayerNorm(config.n_embd, elementwise_affine=config.norm_weights)
        self.attention = SelfAttention(config, layer)
        self.norm2 = nn.LayerNorm(config.n_embd, elementwise_affine=config.norm_weights)
        self.mlp = MLP(config)

    def forward(self, x, idx, cache):
        p = self.config.dropout
        heard = self.attention(self.norm1(x), idx, cache)
        x = x + F.dropout(heard, p, self.training)
        thought = self.mlp(self.norm2(x))
        return x + F.dropout(thought, p, self.training)  # (B, T, C)


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V): at each place, what comes next.

    With no layer it is the bigram model, in which a token sees nothing but itself.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.Embedding(c.vocab_size, c.n_embd)
        if c.position == 'learned':
            self.place = nn.Embedding(c.block_size, c.n_embd)
        if c.smear:
            self.smear = nn.Parameter(torch.zeros(c.n_embd))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd, elementwise_affine=c.norm_weights)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=c.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)  # as in GPT-2, where it was found by trying
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        if c.tied:
            self.head.weight = self.token.weight

    def forward(self, idx, cache=None):
        c, T = self.config, idx.size(1)
        cache = cache or Cache()
        start = cache.length
        assert start == 0 or T == 1, 'a cache that holds tokens takes one more at a time'
        assert start + T <= c.block_size, f'more than block_size={c.block_size} tokens'

        x = self.token(idx)  # (B, T, C)
        if c.smear:
            x = smeared(cache.append('tokens', x), self.smear)[:, -T:]
        if c.position == 'learned':
            x = x + self.place.weight[start:start + T]
        x = F.dropout(x, c.dropout, self.training)
        for block in self.blocks:
            x = block(x, idx, cache)
        cache.length += T
        return self.head(self.norm(x))  # (B, T, V)


# -------------------------------------------------------------------------------------------------
# Generation: draw a token from what the model expects, append it, and again

def next_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw from softmax(logits / temperature): (B, V) to (B, 1).

    Temperature 0 takes the largest. top_k keeps the k likeliest tokens (0: all). Of these top_p
    keeps the fewest that have this probability or more among all V (arXiv:1904.09751).
    """
    p = (logits.float() / max(temperature, 1e-9)).softmax(dim=-1)  # (B, V)
    p, token = p.sort(dim=-1, descending=True)  # the likeliest first
    p = p[:, :top_k or None]
    before = p.cumsum(dim=-1) - p  # the probability of all that are likelier
    p = p.where(before < top_p, 0)
    place = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return token.gather(-1, place)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, **how):
    """Yield the tokens (B,) that follow idx (B, T), T > 0; `how` is next_token's.

    When the window is full, its last half is read again from position 0, and what is older is
    forgotten. Each logit is exactly the model's for the tokens that are kept. It is one reading
    for half a window of new tokens, so on average a token costs the same however long the text.
    """
    window = model.config.block_size
    half = (window + 1) // 2
    seen = new = idx[:, -window:]  # (B, T)
    cache = Cache()  # of all that was seen but what is new
    for _ in range(max_new_tokens):
        if seen.size(1) > window:
            seen = new = seen[:, -half:]
            cache = Cache()
        logits = model(new, cache)[:, -1]  # (B, V)
        new = next_token(logits, **how)  # (B, 1)
        seen = torch.cat((seen, new), dim=1)
        yield new[:, 0]


# -------------------------------------------------------------------------------------------------
# The optimizer

def orthogonalize(G, steps=3):
    """Newton-Schulz: from a matrix G = U S V^T (n, m) towards U V^T.

    X <- a X + b (X X^T) X + c (X X^T)^2 X takes each singular value s to a s + b s^3 + c s^5.
    With these a, b, c, found by trying [2], five steps bring all but the smallest to 0.7 ... 1.2;
    three do as well for learning.
    [2] Jordan et al., Muon, 2024, kellerjordan.github.io/posts/muon
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(0) > G.size(1)
    X = G.T if tall else G  # so that X X^T is the smaller product
    X = X / (X.norm() + 1e-7)  # now s <= 1
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X


TABLES = 'token.weight', 'place.weight', 'value_table.weight'
MATRICES = ('query.weight', 'key.weight', 'value.weight', 'out.weight', 'up.weight',
            'down.weight')


@dataclass
class Optimizer:
    """Muon's rule for the matrices of the blocks, Adam's for everything else.

    With gradient g at step t = 1, 2, ... and a rate r, Adam (arXiv:1412.6980; its weight decay is
    apart from the gradient, arXiv:1711.05101) is

        mean   <- beta1 mean + (1 - beta1) g
        square <- beta2 square + (1 - beta2) g^2
        w <- w - r decay w - r (mean / (1 - beta1^t)) / (sqrt(square / (1 - beta2^t)) + eps)

    and Muon [2], for a matrix w with n rows and m columns,

        mean <- momentum mean + (1 - momentum) g
        w <- w - r decay w - r sqrt(max(1, n/m)) orthogonalize(momentum mean + (1 - momentum) g)

    A gradient has a few large singular values and many small ones. Muon makes all of them 1, so
    the rare directions learn as fast as the common ones. If n > m such a matrix keeps a vector's
    length: m entries of size 1 become n entries of size sqrt(m/n), which the root mends. If not,
    they become entries of size about 1.

    Tables and head go to Adam: each of their rows belongs to one token, and most tokens are rare,
    so that each number needs a measure of its own.
    """
    model: nn.Module
    learning_rate: float
    weight_decay: float = 0.0
    muon: bool = True  # or everything goes to Adam
    beta1: float = 0.8
    beta2: float = 0.99
    momentum: float = 0.95

    def __post_init__(self):
        self.state = {}  # tensors by name: what a checkpoint keeps
        for name, w in self.model.named_parameters():
            self.state[f'mean.{name}'] = torch.zeros_like(w)
            if not (self.muon and name.endswith(MATRICES)):
                self.state[f'square.{name}'] = torch.zeros_like(w)

    @torch.no_grad()
    def step(self, t, share=1.0):
        """Step t = 1, 2, ... with this share of the rate."""
        for name, w in self.model.named_parameters():
            if w.grad is None:
                continue
            g, mean, r = w.grad, self.state[f'mean.{name}'], share * self.learning_rate
            if self.muon and name.endswith(TABLES):
                r *= 5  # but not of the head; found by trying
            w.mul_(1 - r * self.weight_decay)
            if self.muon and name.endswith(MATRICES):
                n, m = w.shape
                mean.lerp_(g, 1 - self.momentum)
                X = orthogonalize(g.lerp(mean, self.momentum))
                w.sub_(r * max(1, n / m) ** 0.5 * X)
            else:
                square = self.state[f'square.{name}']
                mean.lerp_(g, 1 - self.beta1)
                square.lerp_(g.square(), 1 - self.beta2)
                size = (square / (1 - self.beta2**t)).sqrt() + 1e-8
                w.addcdiv_(mean, size, value=-r / (1 - self.beta1**t))


def learn_pairs(model, ids, iterations, most=2**23):
    """Begin from the bigram model: before any block learns anything, the token table and the head
    learn which token follows which in a text ids (N,).

    All pairs at once, from their counts n: the loss is the sum over a, b of
    -n_ab / sum(n) log p(b | a), where p is the softmax of head(norm(token(a))). If the vocabulary
    is large, only the R most frequent tokens a are taken, so that the counts (R, V) are at most
    `most` numbers.
    """
    V = model.config.vocab_size
    rows = ids.bincount(minlength=V).topk(min(V, most // V)).indices  # (R,)
    ab = torch.stack((ids[:-1], ids[1:]))  # (2, N - 1)
    ones = torch.ones(len(ids) - 1)
    n = torch.sparse_coo_tensor(ab, ones, (V, V), check_invariants=True)
    n = n.index_select(0, rows).to_dense()  # (R, V)
    optimizer = Optimizer(model, learning_rate=0.04)
    for t in range(1, iterations + 1):
        logits = model.head(model.norm(model.token.weight[rows]))  # (R, V)
        loss = F.cross_entropy(logits, n, reduction='sum') / n.sum()
        loss.backward()
        optimizer.step(t, min(1, t / 5))
        model.zero_grad()


# =================================================================================================
# What the scripts share and what isn't mathematics

def fail(message):
    """End with one line that says what to do."""
    print(' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def override(settings, **allowed):
    """Let the command line set a script's settings: what stands above this call in lines like
    `seed = 1  # comment`. Returns a dict of them.

    `settings` is the script's globals(). What a setting is allowed to be: a list of words, or of
    the smallest and the largest number. If nothing is said, a number is from 0 to 2^31.
    """
    def boolean(text):
        return ('true', '1', 'yes', 'false', '0', 'no').index(text.lower()) < 3

    kinds = {bool: boolean, int: int, float: float, str: os.path.expanduser}
    block = Path(settings['__file__']).read_text('utf-8').split('= override(')[0]
    parser = argparse.ArgumentParser(description=settings['__doc__'], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f'{message}; --help lists the settings')
    for name, comment in re.findall(r'(?m)^([a-z]\w*) = .*?(?:  # (.*))?$', block):
        value = settings[name]
        if type(value) in kinds:
            parser.add_argument(f'--{name}', default=value, metavar=repr(value),
                                type=kinds[type(value)], help=comment.replace('%', '%%'))
    config = vars(parser.parse_args())
    if [] in config.values():  # what argparse makes of --start=--
        parser.error('-- is no value')

    for name, value in config.items():
        wanted = allowed.get(name, [0, 2**31])
        if isinstance(value, str):
            right = name not in allowed or value in wanted
        else:
            right = wanted[0] <= value <= wanted[1]
        if not right:
            fail(f'--{name}={value}: wanted {wanted}')
    settings.update(config)
    return config


def on_stop(act):
    """Have act(number, frame) called at Ctrl-C, at SIGTERM, and when a terminal is closed."""
    for number in {1, 2, 15} & signal.valid_signals():  # SIGHUP, SIGINT, SIGTERM
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup lets it be
            signal.signal(number, act)


def one_line(kind, error, trace):
    """What files, memory or an assertion don't allow is said in one line. Any other error comes as
    it is."""
    if issubclass(kind, (OSError, AssertionError)):
        fail(error)
    if 'memory' in f'{kind} {error}'.lower():
        fail('no memory for this: take a smaller --batch_size, --block_size or --n_embd')
    sys.__excepthook__(kind, error, trace)


def quiet():
    """Ctrl-C and the like leave no traceback. Nor does a screen that can't show a letter, nor a
    closed pipe, as in `| head`, which ends a script silently."""
    sys.excepthook = one_line
    on_stop(lambda number, frame: sys.exit(128 + number))
    if hasattr(signal, 'SIGPIPE'):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.stdout:
        sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)


def pick_device(name):
    """auto takes cuda, else mps, else cpu."""
    for device in ['cuda', 'mps', 'cpu'] if name == 'auto' else [name]:
        try:
            torch.zeros(1, device=device).item()
            return device
        except Exception:  # of many kinds
            pass
    fail(f'--device={name} is not available here; try --device=auto')


def write(path, data):
    """Replace a file by these bytes, whole or not at all."""
    with open(f'{path}.tmp', 'wb') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.tmp', path)


PAGE = Path(__file__).resolve().parent / 'assets/page.html'


def write_page(path, **data):
    """Write assets/page.html with what it shows in it, four decimals of what stands in a tensor.
    A browser needs nothing else."""
    data = json.dumps(data, default=lambda x: x.cpu().double().round(decimals=4).tolist())
    data = data.replace('<', '\\u003c')  # no text in it is a tag
    write(path, PAGE.read_text('utf-8').replace('DATA', data, 1).encode())


def save(path, model, tokenizer, state={}, **more):
    """Write a checkpoint, a file in the safetensors format, which `load` reads:

        8 bytes    the length of the header, a whole number, lowest byte first
        header     JSON: the dtype, shape and data_offsets (begin and end in what follows) of each
                   tensor; and under __metadata__ strings, here JSON again: config, tokenizer
                   and whatever `more` there is
        numbers    the tensors one after the other, float32, lowest byte first

    `state` is the optimizer's. To read a checkpoint by hand:

        with open('out/ckpt.safetensors', 'rb') as file:
            size, = struct.unpack('<Q', file.read(8))
            header = json.loads(file.read(size))
            begin, end = header['token.weight']['data_offsets']
            file.seek(8 + size + begin)
            numbers = struct.unpack(f'<{(end - begin) // 4}f', file.read(end - begin))
    """
    tensors = {**state, **dict(model.named_parameters())}  # a tied table once
    more.update(config=vars(model.config), tokenizer=[tokenizer.kind, tokenizer.learned])
    header = {'__metadata__': {name: json.dumps(value) for name, value in more.items()}}

    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = dict(dtype='F32', shape=tensor.shape, data_offsets=[begin, end])
    numbers = bytearray(end)
    flat = [tensor.detach().flatten() for tensor in tensors.values()]
    torch.frombuffer(numbers, dtype=torch.float32).copy_(torch.cat(flat))

    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    write(path, len(header).to_bytes(8, 'little') + header + numbers)


def load(path):
    """Read a checkpoint: model, tokenizer, and a dict of all else that was saved.

    There is nothing in a checkpoint that could run. A file that is none raises OSError.
    """
    try:
        with open(path, 'rb') as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
            data = memoryview(bytearray(file.read()))  # slices of which are no copies
        saved = {name: json.loads(text) for name, text in header.pop('__metadata__').items()}
        weights, state = {}, {}
        for name, entry in header.items():
            its = data[slice(*entry['data_offsets'])]
            numbers = torch.frombuffer(its, dtype=torch.float32)
            assert numbers.isfinite().all(), 'numbers that are not finite'
            part = state if name.startswith(('mean.', 'square.')) else weights
            part[name] = numbers.view(entry['shape'])

        (kind, learned), config = saved['tokenizer'], GPTConfig(**saved['config'])
        tokenizer = TOKENIZERS[kind](learned)
        assert config.vocab_size == len(tokenizer.tokens), 'other tokens than the model has'
        assert config.n_layer < len(weights), 'fewer numbers than the model has'
        model = GPT(config)
        weights.setdefault('head.weight', weights['token.weight'])  # if they are tied
        model.load_state_dict(weights)  # no other names, no other shapes
        return model, tokenizer, dict(saved, state=state)
    except Exception as error:  # whatever a damaged or hostile file may raise
        raise OSError(f'{path}: no checkpoint that can be read ({str(error)[:150]}); '
                      'train.py writes one')
