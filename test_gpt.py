"""
What the README and the code claim, each claim proved by running it, in the order in which one
would teach it: papers, characters, batches, the bigram model, attention, the GPT, its training.

    python -m pytest
"""
import doctest
import gzip
import io
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from types import SimpleNamespace

import gpt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpt import BPETokenizer, CharTokenizer, GPT, GPTConfig, Muon, WordTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
PAPERS = os.path.join(HERE, 'papers')
torch.set_num_threads(1)

PAPER = r"""\documentclass{article} % a class
% only a comment
\begin{document}
The set $X$ has 50\% of its %
    points in $Y$.
\begin{comment}
never seen
\end{comment}
\iffalse hidden \fi
\begin{theorem}\label{thm:one}
For each $\eps>0$ there is an $n$ with $\alpha_n<\eps$. % why?
\end{theorem}



The end.
\end{document}
"""

WORDS = 'compact open closed dense finite smooth proper group space bundle map ring field'.split()


def corpus(seed=1, lines=400):
    """Some LaTeX to learn from in a few seconds."""
    chance = random.Random(seed)
    return '\\begin{document}\n' + ''.join(
        f'Let ${chance.choice("XYZ")}_{chance.randint(0, 9)}$ be a {chance.choice(WORDS)} '
        f'{chance.choice(WORDS)} {chance.choice(WORDS)} with $\\{chance.choice(["alpha", "beta"])}'
        f'={chance.randint(10, 99)}$.\n' for _ in range(lines)) + '\\end{document}\n'


class Ended(Exception):
    """A script that has ended with an exit code other than 0."""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script as a user would, in a folder of its own: run('train.py', '--max_iters=3')."""
    monkeypatch.chdir(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def run(script, *arguments, code=0):
        threads = ('--threads=1',) if script == 'train.py' and code == 0 else ()
        monkeypatch.setattr(sys, 'argv', [script, *threads, *arguments])
        names, ended = {}, 0
        try:
            names = runpy.run_path(os.path.join(HERE, script), run_name='__main__')
        except SystemExit as end:
            ended = end.code or 0
        finally:
            signal.signal(signal.SIGINT, handlers[0])
            signal.signal(signal.SIGTERM, handlers[1])
        out, err = capsys.readouterr()
        assert ended == code, err or out
        assert 'Traceback' not in err
        if code == 2:
            assert len(err.strip().splitlines()) == 1, err
        return SimpleNamespace(out=out, err=err, **names)
    return run


@pytest.fixture
def papers(tmp_path):
    """A folder of papers."""
    folder = tmp_path / 'mine'
    folder.mkdir()
    (folder / 'a.tex').write_text(corpus(1))
    (folder / 'b.tex').write_text(corpus(2))
    return folder


TINY = ('--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=8',
        '--max_iters=6', '--eval_interval=3', '--dataset=mine')


def small(**changes):
    """A model with weights that say something."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16,
                                    zero_init=False), **changes}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


# ------------------------------------------------------------------------------ papers into text

def clean(run, tmp_path, text):
    """What prepare.py makes of a paper."""
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / 'paper.tex').write_bytes(data)
    return run('prepare.py', '--source=paper.tex', '--tokenizer=char', '--val_fraction=0.5').text


def test_comments_go_and_text_stays(run, tmp_path):
    """Item 1: arxiv-latex-cleaner takes out comments and what never prints."""
    text = clean(run, tmp_path, PAPER)
    for gone in ('comment', 'never', 'hidden', 'why', 'a class', '\n\n\n'):
        assert gone not in text
    assert '50\\% of its points in $Y$.' in text  # a % joins its line to the next, as in TeX
    assert '\\label{thm:one}' in text and 'The end.' in text


def test_a_percent_sign_before_a_blank_line_keeps_the_paragraph(run, tmp_path):
    assert 'one\n\ntwo' in clean(run, tmp_path, 'one%\n\ntwo, three, four\n')


def test_papers_joined_in_one_file_all_stay(run, tmp_path):
    """The cleaner by itself stops at the first end of a document."""
    second = PAPER.replace('The end.', 'Second end.')
    text = clean(run, tmp_path, PAPER + second)
    assert 'The end.' in text and 'Second end.' in text


def test_repeated_paragraphs_are_dropped(run, tmp_path):
    long = 'This paragraph is an introduction which the author used again. ' * 3
    text = clean(run, tmp_path, f'{long}\n\nshort\n\n{long}\n\nshort\n')
    assert text.count(long.strip()) == 1 and text.count('short') == 2


@pytest.mark.parametrize('data, word', [
    ('caf\u00e9 au lait'.encode(), 'caf\u00e9'),
    ('caf\u00e9 au lait'.encode('latin-1'), 'caf\u00e9'),
    (b'\\usepackage[cp1250]{inputenc} \xe8esky', '\u010desky'),
    (b'\xef\xbb\xbfwith a mark', 'with a mark'),
    ('\u03b4 small'.encode('utf-16'), '\u03b4 small'),
    (b'one\r\ntwo\rthree', 'one\ntwo\nthree')])
def test_every_encoding_is_read(run, tmp_path, data, word):
    assert clean(run, tmp_path, data + b'\n' + b'some text after it\n').startswith(
        word if not data.startswith(b'\\use') else '') and word in clean(
        run, tmp_path, data + b'\nsome text after it\n')


def archive(path, kind, members):
    if kind == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name, data in members.items():
                z.writestr(name, data)
    elif kind.startswith('tar'):
        with tarfile.open(path, 'w:gz' if kind == 'tar.gz' else 'w') as t:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes(gzip.compress(next(iter(members.values()))))


@pytest.mark.parametrize('kind, name', [('zip', 'p.zip'), ('tar.gz', 'p.tar.gz'), ('tar', 'p.tar'),
                                        ('tar.gz', '2101.00001v1'), ('gz', '2101.00001'),
                                        ('gz', 'p.gz'), ('zip', 'wrong.tar')])
def test_archives_give_what_the_folder_gives(run, tmp_path, kind, name):
    """By their first bytes, and nothing is unpacked anywhere."""
    one = corpus(1).encode()
    archive(tmp_path / name, kind, {'deep/PAPER.TEX': one, 'figure.png': b'\x89PNG' * 99})
    (tmp_path / 'plain.tex').write_bytes(one)
    before = {p.name for p in tmp_path.iterdir()} | {'data'}
    texts = [run('prepare.py', f'--source={source}', '--vocab_size=300').text
             for source in (name, 'plain.tex')]
    assert texts[0] == texts[1]
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_bad_file_costs_one_file(run, tmp_path, papers):
    """And its place in the summary says why; the source is never written to."""
    (papers / 'binary.tex').write_bytes(bytes(range(256)) * 20)
    (papers / 'empty.tex').write_bytes(b'')
    (papers / 'cut.tar.gz').write_bytes(gzip.compress(b'x' * 9000)[:20])
    (papers / 'deep.tex').write_text('\\ifx' * 5000 + '\\fi' * 5000 + ' the text stays\n')
    before = {p: p.read_bytes() for p in papers.iterdir()}
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    status = {os.path.basename(row['path']): row['status'] for row in result.sources}
    assert status == {'a.tex': 'cleaned', 'b.tex': 'cleaned', 'binary.tex': 'skipped',
                      'empty.tex': 'skipped', 'cut.tar.gz': 'skipped', 'deep.tex': 'stripped'}
    assert {p: p.read_bytes() for p in papers.iterdir()} == before
    assert 'the text stays' in result.text and 'binary.tex (not a text)' in result.out


# ------------------------------------------------------------------------------ text into tokens

AWKWARD = ['', 'x', 'Gau\u00df, Poincar\u00e9', '\U0001f600', 'a\r\nb', '\\', '\\\\%', '\ufffd',
           ' \t\n\n  x', '\\begin{a_1}^2$\\,$', '\u0394' * 100, '\\' + 'a' * 200, '%' * 99]


@pytest.mark.parametrize('kind', [CharTokenizer, WordTokenizer, BPETokenizer])
def test_decode_undoes_encode(kind):
    """Item 3 and 15: on whatever a tokenizer has learned."""
    for text in AWKWARD:
        tokenizer = kind.learn(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_knows_what_it_never_saw():
    tokenizer = BPETokenizer.learn(PAPER, 400)
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('kind', [CharTokenizer, WordTokenizer])
def test_what_is_not_known_becomes_the_unknown_token(kind):
    tokenizer = kind.learn('abc def')
    assert tokenizer.decode(tokenizer.encode('abc\u00fc')) in ('abc\ufffd', '\ufffd')
    assert len(kind.learn(PAPER, 20).tokens) == 20


def test_one_hot_vectors_and_the_embedding():
    """Item 3: to look up a row is to multiply by a one-hot vector."""
    tokenizer = CharTokenizer.learn('hello')
    ids = torch.tensor(tokenizer.encode('hello'))
    table = torch.randn(len(tokenizer.tokens), 7)
    one_hot = F.one_hot(ids, len(tokenizer.tokens)).float()
    assert (one_hot.sum(1) == 1).all()
    assert torch.equal(one_hot @ table, F.embedding(ids, table))


def test_bpe_merges_the_most_frequent_pair_as_counted():
    """Item 11: every merge is the most frequent pair at its time, by counting anew."""
    text = corpus(3, 60)
    words = [list(map(chr, piece.encode())) for piece in gpt.pieces(text)]
    for n, (a, b) in enumerate(BPETokenizer.learn(text, 256 + 60).learned):
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        assert count[chr(a), chr(b)] == max(count.values())
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (chr(a), chr(b)):
                    word[i:i + 2] = [chr(256 + n)]
                i += 1


def test_pieces_are_latex():
    """No control sequence is cut, and common ones become single tokens."""
    assert list(gpt.pieces('\\alpha_1\\,x \\\\%\n\n  a')) == [
        '\\alpha', '_', '1', '\\,', 'x', ' ', '\\\\', '%', '\n\n  ', 'a']
    tokens = BPETokenizer.learn(corpus(4), 512).tokens
    assert b'\\begin' in tokens or b'\\alpha' in tokens and b' compact' in tokens


def test_text_streams_by_whole_characters():
    tokenizer = BPETokenizer([])
    parts = list(tokenizer.stream('\u03b4\U0001f600!'.encode()))
    assert parts == ['', '\u03b4', '', '', '', '\U0001f600', '!', '']


# ------------------------------------------------------------------------------ data and batches

def test_the_data_set_is_described_and_split(run, papers):
    """Item 2 and 4: the last tenth of the characters validates; the files are what meta says."""
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char')
    with open('data/mine/meta.json') as file:
        meta = json.load(file)
    n = len(result.text)
    assert meta['train']['characters'] == int(0.9 * n)
    assert meta['val']['characters'] == n - int(0.9 * n)
    for name, text in result.parts.items():
        ids = torch.from_file(f'data/mine/{name}.bin', size=meta[name]['tokens'],
                              dtype=torch.int16).tolist()
        assert result.tokens.decode(ids) == text
        assert os.path.getsize(f'data/mine/{name}.bin') == 2 * meta[name]['tokens']
    assert f'{len(set(result.text))} different' in result.out
    assert repr(result.text[:60]) in result.out


def test_the_yardsticks_by_counting(run, papers):
    """Bits per character of the three simplest models, by dictionaries."""
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=word')
    train, val = (result.tokens.encode(result.parts[name]) for name in ('train', 'val'))
    V, N, single, double = len(result.tokens.tokens), len(train), Counter(train), Counter(
        zip(train, train[1:]))
    first = Counter(train[:-1])
    unigram = -sum(math.log2((single[b] + 1) / (N + V)) for b in val) / len(val)
    bigram = -sum(math.log2((double[a, b] + 1) / (first[a] + V))
                  for a, b in zip(val, val[1:])) / (len(val) - 1)
    per_character = len(val) / len(result.parts['val'])
    assert result.meta['yardsticks'] == pytest.approx(dict(
        uniform=math.log2(V) * per_character, unigram=unigram * per_character,
        bigram=bigram * per_character))


def test_batches_are_blocks_and_what_follows(run, papers):
    """Item 4: the target is one token later; four blocks of eight are 32 examples."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char')
    result = run('train.py', *TINY, '--block_size=8', '--batch_size=4', '--max_iters=0')
    (x, y), = result.get_batch(0)
    assert x.shape == y.shape == (4, 8) and y.numel() == 32
    assert torch.equal(x[:, 1:], y[:, :-1])
    train = result.tokenizer.decode(result.train.tolist())
    for row, target in zip(x.tolist(), y.tolist()):
        assert result.tokenizer.decode(row + target[-1:]) in train
    assert torch.equal(result.get_batch(7)[0][0], result.get_batch(7)[0][0])
    assert not torch.equal(result.get_batch(7)[0][0], result.get_batch(8)[0][0])


# ------------------------------------------------------------------------------ the bigram model

def test_a_table_of_unit_normals_starts_half_a_nat_above_ln_V():
    """Item 5: the mean of log sum exp of V unit normals is near ln V + 1/2."""
    torch.manual_seed(0)
    V = 99
    loss = F.cross_entropy(torch.randn(20000, V), torch.randint(V, (20000,)))
    assert math.log(V) == pytest.approx(4.595, abs=1e-3)
    assert loss.item() == pytest.approx(math.log(V) + 0.5, abs=0.02)


def test_the_bigram_model_reaches_the_entropy_of_its_corpus(run, papers):
    """Item 5: --n_layer=0 begins at ln V and ends at what counting pairs gives."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char')
    result = run('train.py', '--dataset=mine', '--n_layer=0', '--n_embd=64', '--block_size=64',
                 '--batch_size=32', '--max_iters=400', '--eval_interval=400')
    ids = [i & 0xffff for i in result.train.tolist()]
    pairs, first = Counter(zip(ids, ids[1:])), Counter(ids[:-1])
    entropy = -sum(n * math.log(n / first[a]) for (a, b), n in pairs.items()) / (len(ids) - 1)
    start, end = result.log[0][4], result.log[-1][4]
    assert start == pytest.approx(math.log(result.V), abs=0.02)
    x = torch.tensor(ids[:-1])
    loss = F.cross_entropy(result.model(x[None])[0], torch.tensor(ids[1:])).item()
    assert entropy < loss < 1.01 * entropy and end < 1.05 * entropy


# ------------------------------------------------------------------------------ attention

def test_averaging_the_past_in_three_ways():
    """Item 6: means in a loop, a triangular matrix, a softmax of masked zeros."""
    x = torch.tensor([[2., 7.], [6., 4.], [6., 5.]])
    loop = torch.stack([x[:t + 1].mean(0) for t in range(3)])
    lower = torch.ones(3, 3).tril()
    matrix = lower / lower.sum(1, keepdim=True) @ x
    soft = torch.zeros(3, 3).masked_fill(lower == 0, -math.inf).softmax(-1) @ x
    expected = torch.tensor([[2, 7], [4, 5.5], [4.6667, 5.3333]])
    for mean in (loop, matrix, soft):
        torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0)
    zero = torch.zeros(1, 1, 3, 2)  # queries and keys that say nothing
    torch.testing.assert_close(gpt.attention(zero, zero, x[None, None])[0, 0], loop)


def test_queries_and_keys_make_the_weights_depend_on_the_data():
    """Item 6: a key that fits draws the average to its value."""
    q = torch.tensor([[0., 0.], [0., 0.], [9., 0.]])[None, None]
    k = torch.tensor([[0., 1.], [9., 0.], [0., 1.]])[None, None]
    v = torch.tensor([[1., 0.], [2., 0.], [3., 0.]])[None, None]
    assert gpt.attention(q, k, v)[0, 0, 2, 0].item() == pytest.approx(2, abs=1e-3)


def test_why_scores_are_divided_by_the_root_of_d_k():
    """Item 7: otherwise they have variance d_k, and a softmax of large numbers is a maximum."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 100_000, 64)
    dots = (q * k).sum(-1)
    assert dots.var().item() == pytest.approx(64, rel=0.05)
    assert (dots / 64 ** 0.5).var().item() == pytest.approx(1, rel=0.05)
    z = torch.tensor([0.1, -0.2, 0.3, -0.2, 0.5])
    torch.testing.assert_close(z.softmax(0), torch.tensor([0.1925, 0.1426, 0.2351, 0.1426, 0.2872]),
                               atol=1e-4, rtol=0)
    torch.testing.assert_close((8 * z).softmax(0), torch.tensor(
        [0.0326, 0.0030, 0.1615, 0.0030, 0.8000]), atol=1e-4, rtol=0)


def test_attention_is_torchs_own():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(gpt.attention(q, k, v),
                               F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_heads_one_by_one_are_one_projection():
    """Item 14: for each head its own W_Q, W_K, W_V, W_O and a mask of -inf; outputs summed."""
    model = small(position='none', value_embeddings=False, head_dim=6)
    layer, (B, T, C, H, D) = model.blocks[0].attention, (2, 7, 16, 2, 6)
    x, total = torch.randn(B, T, C), 0
    mask = torch.full((T, T), -math.inf).triu(1)
    for h in range(H):
        W_Q, W_K, W_V = (w[h * D:(h + 1) * D].T for w in layer.qkv.weight.split(H * D))
        W_O = layer.out.weight[:, h * D:(h + 1) * D].T
        weights = (x @ W_Q @ (x @ W_K).mT / math.sqrt(D) + mask).softmax(-1)
        total = total + weights @ x @ W_V @ W_O
    torch.testing.assert_close(layer(x, None, None, {}), total)


def test_rotary_positions_are_relative():
    """Inner products of rotated vectors depend on the distance alone; lengths stay."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    cos, sin = gpt.rotation(200, 8)
    def at(x, t):
        return gpt.rotate(x, cos[t:t + 1], sin[t:t + 1])
    def score(s, t):
        return (at(q, s) * at(k, t)).sum().item()
    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(6, 2)) > 1e-3
    assert at(q, 77).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    z = torch.view_as_complex(torch.stack(q.chunk(2, -1), -1))  # as complex numbers: times e^it
    turned = z * torch.polar(torch.ones(4), 3 * 10_000.0 ** (-torch.arange(4) / 4))
    torch.testing.assert_close(at(q, 3), torch.cat((turned.real, turned.imag), -1))


def test_layer_normalization_is_of_rows():
    """Item 8: mean 0 and deviation 1 along a row, not along a column."""
    model = small(norm_weights=True)
    nn.init.ones_(model.norm.weight), nn.init.zeros_(model.norm.bias)
    x = 3 * torch.randn(32, 16) + 5
    y = model.norm(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(32), atol=1e-4, rtol=0)
    assert (y.mean(0).abs() > 0.01).any()


# ------------------------------------------------------------------------------ the GPT

ORIGINAL = dict(vocab_size=99, block_size=64, n_layer=4, n_head=4, n_embd=64, norm_weights=True,
                position='learned', activation='relu', bias=True, tied=False,
                value_embeddings=False, smear=False, zero_init=False)


def test_the_original_has_216163_parameters():
    """Item 9."""
    assert GPTConfig(**ORIGINAL).n_params == 216_163


def test_the_second_sources_estimate_agrees_where_it_counts_the_same():
    """Item 13: it counts the embedding, the matrices of attention and the MLP with biases."""
    config = GPTConfig(10_000, n_layer=6, n_head=4, n_embd=128, head_dim=32, mlp_dim=512,
                       activation='relu', position='none', tied=True, bias=False,
                       value_embeddings=False, smear=False)
    assert config.n_params + 6 * (512 + 128) == 2_463_488


@pytest.mark.parametrize('changes', [
    {}, ORIGINAL, dict(n_layer=0), dict(tied=True, bias=True), dict(head_dim=6, mlp_dim=20),
    dict(position='none', activation='gelu'), dict(position='learned', norm_weights=True)])
def test_n_params_by_a_formula(changes):
    c = small(**changes).config
    V, T, C, L, M, HD = (c.vocab_size, c.block_size, c.n_embd, c.n_layer, c.mlp_dim,
                         c.n_head * c.head_dim)
    attention = 4 * C * HD + c.bias * C + c.value_embeddings * V * HD
    mlp = 2 * C * M + c.bias * (C + M)
    once = V * C * (2 - c.tied) + c.bias * V + c.norm_weights * 2 * C
    if L:
        once += c.smear * C + (c.position == 'learned') * T * C
    assert c.n_params == once + L * (attention + mlp + c.norm_weights * 4 * C)


@pytest.mark.parametrize('position', ['rotary', 'learned', 'none'])
def test_the_future_changes_nothing(position):
    """Causality: another token t leaves all logits before t as they are, and changes later ones."""
    model, idx = small(position=position), torch.randint(11, (1, 16))
    before = model(idx)
    for t in (1, 7, 15):
        other = idx.clone()
        other[0, t] = (other[0, t] + 1) % 11
        after = model(other)
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.allclose(after[0, t:], before[0, t:])


def test_positions_matter():
    """Without them, exchanging two tokens of the past changes nothing for what follows."""
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[2, 1, 3, 4, 5]])
    still = small(position='none', smear=False, n_layer=1)
    torch.testing.assert_close(still(idx)[0, -1], still(swapped)[0, -1])
    for position in ('rotary', 'learned'):
        model = small(position=position, smear=False, n_layer=1)
        assert not torch.allclose(model(idx)[0, -1], model(swapped)[0, -1])


@pytest.mark.parametrize('changes', [dict(n_layer=0), {}, dict(bias=True, norm_weights=True)])
def test_the_first_loss_is_ln_V(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(2048, **changes))
    x, y = torch.randint(2048, (2, 8, 64))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(math.log(2048), rel=0.02)


@pytest.mark.parametrize('activation', ['relu', 'relu2', 'gelu'])
def test_a_batch_is_learned_by_heart(activation):
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, block_size=16, n_embd=32, n_layer=1, activation=activation))
    x, y = torch.randint(20, (2, 4, 16))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        adam.zero_grad(), loss.backward(), adam.step()
    assert loss.item() < 0.05


def test_every_setting_of_the_model_is_read():
    """Item 15 names a notebook in which the activation was a setting that nothing read."""
    idx = torch.randint(11, (2, 16))
    plain = small()(idx)
    for changes in (dict(activation='relu'), dict(activation='gelu'), dict(position='none')):
        assert not torch.allclose(small(**changes)(idx), plain)
    tied = small(tied=True)
    assert tied.head.weight is tied.token.weight


# ------------------------------------------------------------------------------ generation

@pytest.mark.parametrize('changes', [dict(position='rotary'), dict(position='learned'),
                                     dict(n_layer=0), dict(block_size=1), dict(tied=True)])
def test_cached_generation_is_recomputation(changes):
    """Token by token, past the block size: full windows start again from their last half."""
    model = small(**changes)
    T, start = model.config.block_size, torch.randint(11, (3, 2))
    seen = start[:, -T:]
    ids = torch.cat([i[:, None] for i in gpt.generate(model, start, 50, temperature=0)], 1)
    for t in range(50):
        if seen.size(1) > T:
            seen = seen[:, -max(1, T // 2):]
        best = model(seen)[:, -1].argmax(-1)
        assert torch.equal(best, ids[:, t])
        seen = torch.cat((seen, best[:, None]), 1)


def test_sampling_follows_the_probabilities():
    """temperature divides the logits, top_k and top_p keep what they say."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20_000, 4)
    def shares(**how):
        torch.manual_seed(0)
        return torch.bincount(gpt.next_token(logits, **how).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(shares(), p, atol=0.02, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), p**2 / (p**2).sum(), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_p=0.9), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95,
                               atol=0.02, rtol=0)
    assert shares(temperature=0).tolist() == shares(top_k=1).tolist() == [1, 0, 0, 0]


# ------------------------------------------------------------------------------ the optimizer

def test_newton_schulz_goes_to_the_polar_factor():
    """Singular vectors stay, singular values come near 1: compared with the SVD."""
    torch.manual_seed(0)
    for n, m in ((32, 32), (16, 64), (64, 16)):
        G = torch.randn(3, n, m)
        X = gpt.orthogonalize(G, steps=5)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        inner = U.mT @ X @ Vh.mT  # diagonal, if the singular vectors are the same
        values = inner.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-3, rtol=0)
        large = S / S.norm(dim=-1, keepdim=True) > 0.01
        assert (values[large] > 0.6).all() and (values < 1.3).all()


def test_muon_is_its_equation_and_torchs():
    """Several steps, matrices of several shapes at once, against an SVD-free loop one by one, and
    against torch.optim.Muon where torch has it (which computes in bfloat16)."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (32, 8), (8, 32)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start]
                    for start in [[torch.randn(s) for s in shapes]] * 2)
    plain, momenta = [w.detach().clone() for w in ours], [torch.zeros(s) for s in shapes]
    muon = Muon(ours, dict(lr=0.1, momentum=0.95))
    torchs = getattr(torch.optim, 'Muon', lambda *a, **k: None)(
        theirs, lr=0.1, weight_decay=0, momentum=0.95, ns_steps=3)
    for _ in range(4):
        for j, (w, other) in enumerate(zip(ours, theirs)):
            w.grad = other.grad = torch.randn_like(w)
            momenta[j] = 0.95 * momenta[j] + 0.05 * w.grad
            step = gpt.orthogonalize(0.95 * momenta[j] + 0.05 * w.grad)
            plain[j] -= 0.1 * max(1, w.size(0) / w.size(1)) ** 0.5 * step
        muon.step()
        if torchs:
            torchs.step()
    for w, expected, other in zip(ours, plain, theirs):
        torch.testing.assert_close(w.data, expected, atol=1e-4, rtol=1e-4)
        if torchs:
            torch.testing.assert_close(w.data, other.data, atol=0.05, rtol=0)


# ------------------------------------------------------------------------------ the whole way

@pytest.mark.parametrize('kind', ['char', 'word', 'bpe'])
def test_the_whole_way(run, papers, kind):
    """Papers in, a trained model, text out, in a folder that holds nothing else."""
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer={kind}', '--vocab_size=300')
    result = run('train.py', *TINY, '--max_iters=60', '--eval_interval=30')
    lines = [line for line in result.out.splitlines() if line.startswith('step')]
    assert [line.split(':')[0] for line in lines] == ['step 0', 'step 30', 'step 60']
    assert 'train loss' in lines[1] and 'bits/char' in lines[1] and 'tok/s' in lines[1]
    assert result.log[-1][4] < 0.8 * result.log[0][4]
    with open('out/log.csv') as file:
        assert len(file.read().splitlines()) == 4
    text = run('sample.py', '--max_new_tokens=50', '--start=Let $X', '--num_samples=2').out
    assert text.startswith('Let $X') and text.count('Let $X') >= 2


def test_finetuning_goes_on_from_what_was_learned(run, papers):
    """Item 12: the first loss is a trained model's; another tokenizer is refused."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    first = run('train.py', *TINY, '--max_iters=60', '--eval_interval=60')
    os.rename('out', 'base')
    (papers / 'a.tex').write_text(corpus(7))
    run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer_from=base/ckpt.pt')
    second = run('train.py', *TINY, '--init_from=base/ckpt.pt')
    assert second.log[0][4] < first.log[0][4] - 1
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=290')
    refused = run('train.py', *TINY, '--init_from=base/ckpt.pt', code=2)
    assert '--tokenizer_from=base/ckpt.pt' in refused.err


@pytest.mark.parametrize('kind', ['char', 'word', 'bpe'])
@pytest.mark.parametrize('extra', [(), ('--dropout=0.1', '--optimizer=adamw')])
def test_a_resumed_run_is_the_run_that_never_stopped(run, papers, monkeypatch, kind, extra):
    """Bit for bit: stopped by Ctrl-C in its fourth step, and resumed."""
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer={kind}', '--vocab_size=300')
    whole = run('train.py', *TINY, '--out_dir=whole', *extra)
    steps, step = [], torch.optim.AdamW.step

    def interrupted(self, *arguments):
        steps.append(step(self, *arguments))
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, 'step', interrupted)
        stopped = run('train.py', *TINY, '--out_dir=stopped', *extra, code=130)
    assert 'python train.py --init_from=resume --out_dir=stopped' in stopped.out
    resumed = run('train.py', '--init_from=resume', '--out_dir=stopped')
    assert len(steps) == 4 and 'resumed at step 4' in resumed.out
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(whole.log, resumed.log):
        assert a[:2] + a[3:] == b[:2] + b[3:]  # all but the seconds
    again = run('train.py', '--init_from=resume', '--out_dir=stopped')
    assert 'finished' in again.out


def test_nothing_trained_is_overwritten(run, papers):
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    run('train.py', *TINY)
    with open('out/ckpt.pt', 'rb') as file:
        first = file.read()
    assert 'out.1' in run('train.py', *TINY).out
    with open('out.1/ckpt.pt', 'rb') as file:
        assert file.read() == first


# ------------------------------------------------------------------------------ settings

@pytest.mark.parametrize('script, argument, hint', [
    ('train.py', '--bach_size=3', 'bach_size'), ('train.py', '--batch_size=x', 'int'),
    ('train.py', '--batch_size=0', '1 to'), ('train.py', '--dropout=nan', '0 to'),
    ('train.py', '--compile=perhaps', 'compile'), ('train.py', '--position=left', 'rotary, learned'),
    ('train.py', '--max_iters', 'max_iters'), ('train.py', '--n_head=3', 'n_head'),
    ('train.py', '--head_dim=7', 'even'), ('train.py', 'config.py', 'config.py'),
    ('train.py', '--device=abacus', 'device'), ('prepare.py', '--source=nowhere', 'nowhere'),
    ('prepare.py', '--val_fraction=2', '0.001 to'), ('sample.py', '--temperature=-1', '0 to'),
    ('sample.py', '--out_dir=nowhere', 'nowhere'), ('train.py', '--dataset=nowhere', 'prepare.py')])
def test_a_wrong_setting_ends_with_one_line(run, script, argument, hint):
    assert hint in run(script, argument, code=2).err


def test_settings_are_taken_and_listed(run, papers):
    run('prepare.py', '--source=mine', '--dataset', 'mine', '--vocab_size', '300')
    result = run('train.py', *TINY, '--bias=yes', '--learning_rate=1', '--tied=0')
    assert result.bias is True and result.learning_rate == 1.0 and result.tied is False
    listed = run('train.py', '--help', '--n_embd=3').out
    for name in result.config:
        assert f'--{name}' in listed
    assert run('sample.py', '--start=a=b', '--max_new_tokens=3').out.startswith('a=b')


def test_the_docstrings_examples():
    assert doctest.testmod(gpt).failed == 0
