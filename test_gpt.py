"""
What the README and the code claim, each claim proved by running it, in the order in which one
would teach it: papers, characters, batches, the bigram model, attention, the GPT, its training.

    python -m pytest
    python test_gpt.py --torture     what takes minutes: kills, bombs, long runs
"""
import csv
import doctest
import gc
import glob
import gzip
import io
import json
import lzma
import math
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import Counter
from types import SimpleNamespace

import gpt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from arxiv_latex_cleaner import arxiv_latex_cleaner
from gpt import BPETokenizer, CharTokenizer, GPT, GPTConfig, WordTokenizer

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
    handlers = {number: signal.getsignal(number) for number in signal.Signals
                if number.name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGPIPE')}

    def run(script, *arguments, code=0, lines=1):
        fresh = script == 'train.py' and '--init_from=resume' not in arguments
        threads = ('--threads=1',) * fresh
        monkeypatch.setattr(sys, 'argv', [script, *threads, *arguments])
        names, ended = {}, 0
        gc.collect()
        try:
            names = runpy.run_path(os.path.join(HERE, script), run_name='__main__')
        except SystemExit as end:
            ended = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.excepthook = sys.__excepthook__
        if names.get('lock'):
            names['lock'].close()  # as the end of the process does
        gc.collect()
        out, err = capsys.readouterr()
        assert ended == code, err or out
        assert 'Traceback' not in err
        if code == 2:
            assert len(err.strip().splitlines()) == lines, err
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


@pytest.fixture(scope='session')
def data_set(tmp_path_factory):
    """What prepare.py makes of these papers with a vocabulary of 300, once for all tests."""
    folder = tmp_path_factory.mktemp('prepared')
    (folder / 'mine').mkdir()
    (folder / 'mine' / 'a.tex').write_text(corpus(1))
    (folder / 'mine' / 'b.tex').write_text(corpus(2))
    subprocess.run([sys.executable, os.path.join(HERE, 'prepare.py'), '--source=mine',
                    '--dataset=mine', '--vocab_size=300'], cwd=folder, check=True)
    return folder / 'data'


@pytest.fixture
def prepared(data_set, papers, tmp_path):
    """The papers and their data set, in data/mine."""
    shutil.copytree(data_set, tmp_path / 'data')


TINY = ('--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=8',
        '--max_iters=6', '--eval_interval=3', '--dataset=mine')


def small(**changes):
    """A model with weights that say something."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=11, block_size=16, n_layer=2, n_head=2,
                                    n_embd=16), **changes}))
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
    """Arxiv-latex-cleaner takes out comments and what never prints."""
    text = clean(run, tmp_path, PAPER)
    for gone in ('comment', 'never', 'hidden', 'why', 'a class', '\n\n\n'):
        assert gone not in text
    assert '50\\% of its points in $Y$.' in text  # a % joins its line to the next, as in TeX
    assert '\\label{thm:one}' in text and 'The end.' in text


@pytest.mark.parametrize('paper, text', [
    ('one%\n\ntwo', 'one\n\ntwo'),
    ('one%\n% no\n   two', 'onetwo'),
    ('one\n\t % no\ntwo', 'one\ntwo'),
    ('one\n\n% no\n\n  two', 'one\n\n  two'),
    ('\\small% no\n  one \\small%\n$x$', '\\small one \\small$x$'),
    ('a\\\\% no\nb \\% c', 'a\\\\b \\% c'),
    ('one\n\\begin{comment}\n\\verb|no\n\\end{comment}\ntwo% | no', 'one\ntwo'),
    ('% \\begin{verbatim}\nx % no\n% \\end{verbatim}\ny', 'x y'),
    ('\\begin{verbatim}\nx % no\n\\begin{verbatim}\n%\n\\end{verbatim}',
     '\\begin{verbatim}\nx \\begin{verbatim}\n%\n\\end{verbatim}')])
def test_comments_end_as_in_tex(run, tmp_path, paper, text):
    """With the end of their line, but not with that of a paragraph or of a control word."""
    assert clean(run, tmp_path, f'begin\n\n{paper}\n\nend') == f'begin\n\n{text}\n\nend'


@pytest.mark.parametrize('verbatim', [
    *(f'\\begin{{{name}}}\n% a \\iffalse\n  \\end{{document}}\n\\end{{{name}}}'
      for name in ('verbatim', 'verbatim*', 'Verbatim', 'BVerbatim', 'lstlisting', 'alltt')),
    '\\begin{minted}[x=%]{tex}\n\\\\% a\n\\end{minted}', '\\verb|\\iffalse| b \\verb*+%\\fi+',
    '\\lstinline[x=y]!%! \\lstinline{{%}} \\mintinline{c}|%|', '\\url{a%b} \\url|%|',
    '\\href{a%b\\#}{c} \\href {%20} {c} \\nolinkurl{%}', '\\path{%}'])
def test_what_is_verbatim_stays_as_it_is(run, tmp_path, verbatim):
    text = clean(run, tmp_path, f'begin\n\n{verbatim} % no\n\\iffalse no\\fi end, the end')
    assert text == f'begin\n\n{verbatim} end, the end'


def test_preambles_and_what_tex_never_reads_go(run, tmp_path):
    """A file of joined papers keeps them all, without preambles and what is between them; macros
    are kept in meta.json, where they are whole and don't name themselves."""
    listing = '\\begin{verbatim}\n\\end{document}\n\\documentclass{x}\n\\end{verbatim}'
    macros = {'\\R': '\\newcommand{\\R}{\\mathbb{R}}',
              '\\e': '\\newcommand*\\e[1]{\\|#1\\epsilon\\}}',
              '\\Hom': '\\DeclareMathOperator{\\Hom}{Hom}'}
    second = PAPER.replace('The end', 'Second end')
    first = PAPER.replace('The end', listing + 'The end').replace(
        '% a class', '\n'.join(macros.values()) + '\\newcommand{\\x}{a\\x}')
    text = clean(run, tmp_path, 'never\n' + first + 'never\n' + second + 'never\n\\begin{document}'
                 'Third.\n\\endinput\nnever\n\\documentstyle{never}\n\\begin{document}Fourth')
    assert 'The end.' in text and 'Second end.' in text and 'Third.' in text and 'Fourth' in text
    assert listing in text and 'never' not in text and text.count('\\documentclass') == 1
    with open('data/papers/meta.json') as file:
        assert json.load(file)['macros'] == [*macros.values()]


def test_repeated_paragraphs_are_dropped(run, tmp_path):
    long = 'This paragraph is an introduction which the author used again. ' * 3
    text = clean(run, tmp_path, f'{long}\n\nshort\n\n{long}\n\nshort\n')
    assert text.count(long.strip()) == 1 and text.count('short') == 2


@pytest.mark.parametrize('data, word', [
    ('caf\u00e9 au lait'.encode(), 'caf\u00e9'),
    ('caf\u00e9 \u201cau lait\u201d'.encode('cp1252'), 'caf\u00e9 \u201cau lait\u201d'),
    (b'%\\usepackage[latin1]{inputenc}\n\\usepackage[cp1250]{inputenc} \xe8esky', '\u010desky'),
    (b'\\usepackage[x,koi8-r]{inputenc} \xf4', '\u0422'),
    (b'\\inputencoding{iso88595} \xc2', '\u0422'),
    (b'caf\xc3\xa9\n% caf\xe9', 'caf\u00e9\nsome'),
    (b'caf\xc3\xa9\rcaf\xe9', 'caf\u00e9\ncaf\u00e9\nsome'),
    (b'\xef\xbb\xbfwith a mark', 'with a mark'),
    ('\u03b4 small'.encode('utf-16'), '\u03b4 small'),
    (b'one\r\ntwo\rthree\r\r\nfour', 'one\ntwo\nthree\nfour')])
def test_every_encoding_is_read(run, tmp_path, data, word):
    """Line by line, where a file isn't UTF-8 as a whole."""
    text = clean(run, tmp_path, data + b'\nsome text after it\n')
    assert word in text
    assert text.startswith(word) or b'inputenc' in data


def archive(path, kind, members):
    if kind == 'zip':
        with zipfile.ZipFile(path, 'w') as z:
            for name, data in members.items():
                z.writestr(name, data)
    elif kind.startswith('tar'):
        with tarfile.open(path, kind.replace('tar', 'w').replace('.', ':')) as t:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes(gzip.compress(next(iter(members.values()))))


@pytest.mark.parametrize('kind, name', [('zip', 'p.zip'), ('tar.gz', 'p.tar.gz'), ('tar', 'p.tar'),
                                        ('tar.bz2', 'p.tar.bz2'), ('tar.xz', 'p.txz'),
                                        ('tar.gz', '2101.00001v1'), ('gz', '2101.00001'),
                                        ('gz', 'p.gz'), ('zip', 'wrong.tar')])
def test_archives_give_what_the_folder_gives(run, tmp_path, kind, name):
    """By their first bytes, also within another, and nothing is unpacked anywhere."""
    one = 99 * b'% a remark\n' + corpus(1).encode()
    archive(tmp_path / name, kind, {'deep/PAPER.TEX': one, 'figure.png': b'\x89PNG' * 99})
    archive(tmp_path / 'outer.zip', 'zip', {f'in/{name}': (tmp_path / name).read_bytes()})
    (tmp_path / '0309136').write_bytes(one)
    before = {p.name for p in tmp_path.iterdir()} | {'data'}
    texts = [run('prepare.py', f'--source={source}', '--vocab_size=300').text
             for source in (name, 'outer.zip', '0309136')]
    assert texts[0] == texts[1] == texts[2] == corpus(1).strip()
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_bad_file_costs_one_file(run, tmp_path, papers):
    """And its place in the summary says why; the source is never written to."""
    (papers / 'binary.tex').write_bytes(bytes(range(256)) * 20)
    (papers / 'empty.tex').write_bytes(b'')
    (papers / 'crashed.tex').write_bytes(corpus(3).encode() + bytes(999))
    (papers / 'cut.tar.gz').write_bytes(gzip.compress(b'x' * 9000)[:20])
    (papers / 'deep.tex').write_text('\\ifx' * 5000 + '\\fi' * 5000 + ' the text stays\n')
    before = {p: p.read_bytes() for p in papers.iterdir()}
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    status = {os.path.basename(row['path']): row['status'] for row in result.sources}
    assert status == {'a.tex': 'cleaned', 'b.tex': 'cleaned', 'crashed.tex': 'cleaned',
                      'binary.tex': 'skipped', 'empty.tex': 'skipped', 'cut.tar.gz': 'skipped',
                      'deep.tex': 'stripped'}
    assert {p: p.read_bytes() for p in papers.iterdir()} == before
    assert 'the text stays' in result.text and 'binary.tex (binary, not LaTeX)' in result.out


@pytest.mark.parametrize('data, kind', [
    ('<!DOCTYPE html>', 'HTML'), (' <html lang="en">', 'HTML'), ('{\\rtf1', 'RTF'),
    ('%!PS-Adobe-3.0', 'PostScript'), ('%PDF-1.5', 'PDF'),
    ('version https://git-lfs.github.com/spec/v1', 'git_lfs')])
def test_what_is_only_called_tex_is_skipped(run, papers, data, kind):
    (papers / 'junk.tex').write_text(data + '\njunk')
    result = run('prepare.py', '--source=mine', '--vocab_size=300')
    assert 'junk' not in result.text and f'junk.tex ({kind}, not LaTeX)' in result.out


def test_nothing_is_passed_over_without_a_word(run, tmp_path, papers):
    """What gave nothing is named, what nobody expects to is counted."""
    archive(papers / 'a.zip', 'zip', {'x.png': b'', 'y.PNG': b''})
    for name in '2101.00002', 'no.zip', 'no.TGZ', 'notes.txt':
        (papers / name).write_text('no paper')
    (papers / 'cafe.tex').write_bytes(b'caf\xe9')
    os.symlink(tmp_path, papers / 'link')
    out = run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300').out
    for said in ('/a.zip (no', '/2101.00002 (no', '/no.zip (no', '/no.TGZ (no', '/link (a link',
                 'not LaTeX: 2 .png, 1 .txt', '1 in cp1252', '5 skipped'):
        assert said in out


# ------------------------------------------------------------------------------ text into tokens

AWKWARD = ['', 'x', 'Gau\u00df, Poincar\u00e9', '\U0001f600', 'a\r\nb', '\\', '\\\\%', '\ufffd',
           ' \t\n\n  x', '\\begin{a_1}^2$\\,$', '\u0394' * 100, '\\' + 'a' * 200, '%' * 99]


@pytest.mark.parametrize('kind', [CharTokenizer, WordTokenizer, BPETokenizer])
def test_decode_undoes_encode(kind):
    """On whatever a tokenizer has learned."""
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
    """To look up a row is to multiply by a one-hot vector."""
    tokenizer = CharTokenizer.learn('hello')
    ids = torch.tensor(tokenizer.encode('hello'))
    table = torch.randn(len(tokenizer.tokens), 7)
    one_hot = F.one_hot(ids, len(tokenizer.tokens)).float()
    assert (one_hot.sum(1) == 1).all()
    assert torch.equal(one_hot @ table, F.embedding(ids, table))


def test_bpe_merges_the_most_frequent_pair_as_counted():
    """Every merge is the most frequent pair at its time, by counting anew."""
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


def test_the_papers_that_come_along_come_back(run):
    """Every file of papers/ goes through the cleaner, and each kind of tokenizer, learned on all of
    it without a limit, gives it back."""
    result = run('prepare.py', f'--source={PAPERS}', '--vocab_size=300')
    assert [row['status'] for row in result.sources] == ['cleaned'] * len(
        [name for name in os.listdir(PAPERS) if name.endswith('.tex')])
    assert len(result.text) > 500_000 and '%' not in result.text.replace('\\%', '')
    for kind in gpt.TOKENIZERS.values():
        tokenizer = kind.learn(result.text)
        assert tokenizer.decode(tokenizer.encode(result.text)) == result.text


# ------------------------------------------------------------------------------ data and batches

def test_the_data_set_is_described_and_split(run, papers):
    """The last tenth of the characters validates; the files are what meta says."""
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char')
    with open('data/mine/meta.json') as file:
        meta = json.load(file)
    n = len(result.text)
    assert meta['train']['characters'] == int(0.9 * n)
    assert meta['val']['characters'] == n - int(0.9 * n)
    for name, text in ('train', result.text[:result.cut]), ('val', result.text[result.cut:]):
        ids = torch.from_file(f'data/mine/{name}.bin', size=meta[name]['tokens'],
                              dtype=torch.int16).tolist()
        assert result.tokens.decode(ids) == text
        assert os.path.getsize(f'data/mine/{name}.bin') == 2 * meta[name]['tokens']
    assert f'{len(set(result.text))} different' in result.out
    assert repr(result.text[:60]) in result.out and '--init_from=' in result.out


def test_papers_are_in_an_order_that_no_name_changes(run, papers):
    """And another paper changes it nowhere else."""
    def prepared():
        return run('prepare.py', '--source=mine', '--vocab_size=300').text.split('\n\n')

    before = prepared()
    os.rename(papers / 'a.tex', papers / 'z.tex')
    assert prepared() == before
    (papers / 'c.tex').write_text(corpus(3))
    assert [paper for paper in prepared() if paper in before] == before


def test_validation_leaves_out_what_stands_in_training(run, tmp_path):
    """A paragraph of the last part that stands before it but for a word and its line ends."""
    paragraphs = ['\n'.join(corpus(seed, 4).split('\n')[1:-2]) for seed in range(100)]
    again = paragraphs[0].replace('\n', ' ').replace('Let', 'Now let', 1)
    (tmp_path / 'a.tex').write_text('\n\n'.join(paragraphs[:95] + [again] + paragraphs[95:]))
    result = run('prepare.py', '--source=a.tex', '--vocab_size=300')
    assert result.text == '\n\n'.join(paragraphs)
    assert result.meta['left_out'] == len(again) + 2 and f'{len(again) + 2:,} of' in result.out


def test_the_yardsticks_by_counting(run, papers):
    """Bits per character of the three simplest models, by dictionaries, and of xz."""
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=word')
    train_text, val_text = result.text[:result.cut], result.text[result.cut:]
    train, val = map(result.tokens.encode, (train_text, val_text))
    V, N, single, double = len(result.tokens.tokens), len(train), Counter(train), Counter(
        zip(train, train[1:]))
    unigram = -sum(math.log2((single[b] + 1) / (N + V)) for b in val)
    bigram = -sum(math.log2((double[a, b] + 1) / (single[a] + V))
                  for a, b in zip(train[-1:] + val, val))
    packed = len(lzma.compress(result.text.encode())) - len(lzma.compress(train_text.encode()))
    assert result.meta['yardsticks'] == pytest.approx(dict(
        uniform=math.log2(V) * len(val) / len(val_text), unigram=unigram / len(val_text),
        bigram=bigram / len(val_text), xz=8 * packed / len(val_text)))


def test_a_swap_cut_short_is_put_right(run, prepared):
    """Killed between its two renames, or before or after them, it leaves one whole data set."""
    for left, there in (('.old', True), ('.tmp', True), ('.old', False)):
        shutil.copytree('data/mine', f'data/mine{left}')
        if not there:
            shutil.rmtree('data/mine')
        run('prepare.py', '--source=nowhere', '--dataset=mine', code=2)
        assert os.listdir('data') == ['mine'] and len(os.listdir('data/mine')) == 3


def test_a_folder_that_holds_anything_else_is_never_replaced(run, papers):
    """Neither the papers themselves nor what has the name of a half-written data set."""
    os.makedirs('data/x.old/work')
    for name in '../mine', 'x':
        said = run('prepare.py', '--source=mine', f'--dataset={name}', code=2).err
        assert 'holds more' in said
    assert os.path.exists('data/x.old/work') and len(os.listdir('mine')) == 2


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_copy_of_a_paper(run, papers, tmp_path, monkeypatch, number):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    monkeypatch.setattr(arxiv_latex_cleaner, 'run_arxiv_cleaner',
                        lambda _: os.kill(os.getpid(), number))
    run('prepare.py', '--source=mine', '--dataset=mine', code=128 + number)
    gc.collect()  # a process of its own would end here
    assert os.listdir(tmp_path / 'temporary') == [] and not os.path.exists('data')


def test_batches_are_blocks_and_what_follows(run, papers):
    """The target is one token later; four blocks of eight are 32 examples."""
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
    """The mean of log sum exp of V unit normals is near ln V + 1/2."""
    torch.manual_seed(0)
    V = 99
    loss = F.cross_entropy(torch.randn(20000, V), torch.randint(V, (20000,)))
    assert math.log(V) == pytest.approx(4.595, abs=1e-3)
    assert loss.item() == pytest.approx(math.log(V) + 0.5, abs=0.02)


def test_the_bigram_model_reaches_the_entropy_of_its_corpus(run, papers):
    """--n_layer=0 begins at ln V and ends at what counting pairs gives."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char')
    result = run('train.py', '--dataset=mine', '--n_layer=0', '--n_embd=64', '--block_size=64',
                 '--batch_size=32', '--max_iters=400', '--eval_interval=400')
    ids = [i & 0xffff for i in result.train.tolist()]
    pairs, first = Counter(zip(ids, ids[1:])), Counter(ids[:-1])
    entropy = -sum(n * math.log(n / first[a]) for (a, b), n in pairs.items()) / (len(ids) - 1)
    assert result.log[0][4] == pytest.approx(math.log(result.V), abs=0.02)
    table = result.model(torch.arange(result.V)[:, None])[:, 0]  # (V, V): what follows each token
    loss = F.cross_entropy(table[ids[:-1]], torch.tensor(ids[1:])).item()
    assert entropy < loss < 1.01 * entropy and result.log[-1][4] < 1.05 * entropy


# ------------------------------------------------------------------------------ attention

def test_averaging_the_past_in_three_ways():
    """Means in a loop, a triangular matrix, a softmax of masked zeros."""
    x = torch.tensor([[2., 7.], [6., 4.], [6., 5.]])
    loop = torch.stack([x[:t + 1].mean(0) for t in range(3)])
    lower = torch.ones(3, 3).tril()
    matrix = lower / lower.sum(1, keepdim=True) @ x
    soft = torch.zeros(3, 3).masked_fill(lower == 0, -math.inf).softmax(-1) @ x
    expected = torch.tensor([[2, 7], [4, 5.5], [4.6667, 5.3333]])
    for mean in (loop, matrix, soft):
        torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0)
    zero = torch.zeros(1, 1, 3, 2)  # queries and keys that say nothing
    mean = gpt.attention(zero, zero, x[None, None], is_causal=True)
    torch.testing.assert_close(mean[0, 0], loop)


def test_queries_and_keys_make_the_weights_depend_on_the_data():
    """A key that fits draws the average to its value."""
    q = torch.tensor([[0., 0.], [0., 0.], [9., 0.]])[None, None]
    k = torch.tensor([[0., 1.], [9., 0.], [0., 1.]])[None, None]
    v = torch.tensor([[1., 0.], [2., 0.], [3., 0.]])[None, None]
    seen = gpt.attention(q, k, v, is_causal=True)
    assert seen[0, 0, 2, 0].item() == pytest.approx(2, abs=1e-3)


def test_why_scores_are_divided_by_the_root_of_d_k():
    """Otherwise they have variance d_k, and a softmax of large numbers is a maximum."""
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


@pytest.mark.parametrize('mask', [
    dict(is_causal=True), {}, dict(attn_mask=torch.randn(9, 9)),
    dict(attn_mask=torch.ones(9, 9, dtype=torch.bool).tril().triu(-3))])
def test_attention_is_torchs_own(mask):
    """With any mask that a fork may give it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(gpt.attention(q, k, v, **mask),
                               F.scaled_dot_product_attention(q, k, v, **mask))


def test_heads_one_by_one_are_one_projection():
    """For each head its own W_Q, W_K, W_V, W_O and a mask of -inf; outputs summed."""
    model = small(position='none', value_embeddings=False, head_dim=6)
    layer, (B, T, C, H, D) = model.blocks[0].attention, (2, 7, 16, 2, 6)
    x, total = torch.randn(B, T, C), 0
    mask = torch.full((T, T), -math.inf).triu(1)
    for h in range(H):
        rows = slice(h * D, (h + 1) * D)
        W_Q, W_K, W_V = (w.weight[rows].T for w in (layer.query, layer.key, layer.value))
        W_O = layer.out.weight[:, rows].T
        weights = (x @ W_Q @ (x @ W_K).mT / math.sqrt(D) + mask).softmax(-1)
        total = total + weights @ x @ W_V @ W_O
    torch.testing.assert_close(layer(x, None, None, None), total)


def test_value_embeddings_and_smear_by_hand():
    """A table's row is added to the values; a share of the token before to each token."""
    model, idx = small(position='none', n_layer=1), torch.randint(11, (2, 7))
    seen = []
    model.blocks[0].attention.register_forward_hook(lambda _, inputs, y: seen.append((inputs[0], y)))
    model(idx)
    x = model.token(idx)
    before = torch.cat((torch.zeros(2, 1, 16), x[:, :-1]), dim=1)
    torch.testing.assert_close(seen[0][0], F.layer_norm(x + model.smear * before, [16]))
    layer, n = model.blocks[0].attention, seen[0][0]
    q, k, v = (y.view(2, 7, 2, 8).transpose(1, 2) for y in (
        layer.query(n), layer.key(n), layer.value(n) + layer.value_table.weight[idx]))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0][1], layer.out(y))


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
    """Mean 0 and deviation 1 along a row, not along a column."""
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
                value_embeddings=False, smear=False)


def test_the_original_has_216163_parameters():
    """99 characters, block 64, 4 layers, 4 heads, 64 channels: as its author counted."""
    assert GPTConfig(**ORIGINAL).n_params == 216_163


def test_the_second_sources_estimate_agrees_where_it_counts_the_same():
    """It counts the embedding, the matrices of attention and the MLP with biases."""
    config = GPTConfig(10_000, n_layer=6, n_head=4, n_embd=128, head_dim=32, mlp_dim=512,
                       activation='relu', position='none', tied=True, bias=False,
                       value_embeddings=False, smear=False)
    assert config.n_params + 6 * (512 + 128) == 2_463_488


def test_n_params_by_counting():
    """In a hundred shapes."""
    chance = random.Random(0)
    for _ in range(100):
        switches = ('norm_weights', 'bias', 'tied', 'value_embeddings', 'smear')
        config = GPTConfig(
            vocab_size=chance.randint(1, 40), block_size=chance.randint(1, 9),
            n_layer=chance.randint(0, 3), n_head=chance.randint(1, 4), n_embd=chance.randint(1, 30),
            head_dim=2 * chance.randint(1, 5), mlp_dim=chance.randint(0, 9),
            position=chance.choice(gpt.POSITIONS),
            **{name: chance.random() < 0.5 for name in switches})
        assert config.n_params == sum(p.numel() for p in GPT(config).parameters())


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
    """There are notebooks in which the activation is a setting that nothing reads."""
    idx = torch.randint(11, (2, 16))
    plain = small()(idx)
    for changes in (dict(activation='relu'), dict(activation='gelu'), dict(position='none')):
        assert not torch.allclose(small(**changes)(idx), plain)
    tied = small(tied=True)
    assert tied.head.weight is tied.token.weight


def test_the_gradient_of_the_loss_by_the_logits_is_p_less_1_at_y():
    logits, y = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    F.cross_entropy(logits, y, reduction='sum').backward()
    torch.testing.assert_close(logits.grad, logits.softmax(-1).detach() - F.one_hot(y, 7))


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


def test_a_cache_that_holds_tokens_takes_one_more_at_a_time():
    """Several at once would see each other's future; too many have no place."""
    model, cache = small(), gpt.Cache()
    whole = model(torch.tensor([[1, 2, 3, 4]]))
    model(torch.tensor([[1, 2]]), cache)
    with pytest.raises(AssertionError, match='one more at a time'):
        model(torch.tensor([[3, 4]]), cache)
    for t in (2, 3):
        torch.testing.assert_close(model(torch.tensor([[t + 1]]), cache)[:, 0], whole[:, t])
    with pytest.raises(AssertionError, match='block_size=16'):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_sampling_follows_the_probabilities():
    """temperature divides the logits, top_k and top_p keep what they say."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20_000, 4)
    def shares(**how):
        torch.manual_seed(0)
        return torch.bincount(gpt.next_token(logits, **how).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(shares(), p, atol=0.02, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), p**2 / (p**2).sum(), atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]),
                               atol=0.02, rtol=0)
    torch.testing.assert_close(shares(top_p=0.9), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95,
                               atol=0.02, rtol=0)
    assert shares(temperature=0).tolist() == shares(top_k=1).tolist() == [1, 0, 0, 0]
    equal = gpt.next_token(torch.zeros(20_000, 4), top_k=1).flatten()
    assert torch.bincount(equal).min() > 4000  # equal logits are all kept


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


def walk(model, steps, *steppers):
    """Take steps by random gradients, the same for each model's parameters."""
    torch.manual_seed(0)
    for t in range(1, steps + 1):
        for name, w in model.named_parameters():
            w.grad = torch.randn_like(w)
        for step in steppers:
            step(t)


@pytest.mark.parametrize('muon', [True, False])
def test_the_rest_walks_as_torchs_adamw(muon):
    """Twenty steps, weight decay and all, each kind of parameter at its rate."""
    model = small(bias=True, norm_weights=True)
    other = [nn.Parameter(w.detach().clone()) for w in model.parameters()]
    ours = gpt.Optimizer(model, 0.01, table_rate=0.1, matrix_rate=0.02, beta1=0.8, beta2=0.99,
                         weight_decay=0.3, muon=muon)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    theirs = torch.optim.AdamW([
        dict(params=[b], lr=0.1 if muon and any(a is table for table in tables) else 0.01)
        for a, b in zip(model.parameters(), other)], betas=(0.8, 0.99), weight_decay=0.3)

    def torchs(t):
        for a, b in zip(model.parameters(), other):
            b.grad = a.grad
        theirs.step()
    walk(model, 20, ours.step, torchs)
    adams = [(a, b) for (name, a), b in zip(model.named_parameters(), other)
             if f'square.{name}' in ours.state]
    assert len(adams) == len(other) - 12 * muon  # six matrices in each of two blocks
    for a, b in adams:
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_matrices_walk_by_muons_rule():
    """Against a plain loop, a matrix at a time; and torch.optim.Muon, which rounds to bfloat16."""
    model = small(mlp_dim=40)
    names = [name for name, w in model.blocks.named_parameters()
             if w.dim() == 2 and 'table' not in name]
    ours = [model.blocks.get_parameter(name) for name in names]
    plain, theirs = ([nn.Parameter(w.detach().clone()) for w in ours] for _ in range(2))
    means = [torch.zeros_like(w) for w in ours]
    optimizer = gpt.Optimizer(model, 0.01, 0.1, matrix_rate=0.02, momentum=0.9, matrix_decay=0.1)
    torchs = getattr(torch.optim, 'Muon', lambda *_, **__: None)(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=3)

    @torch.no_grad()
    def by_hand(t):
        for j, (w, mean) in enumerate(zip(plain, means)):
            g, (n, m) = ours[j].grad, w.shape
            mean.copy_(0.9 * mean + 0.1 * g)
            X = 0.9 * mean + 0.1 * g
            X = X / X.norm()
            for _ in range(3):
                X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
            w -= 0.02 * 0.1 * w + 0.02 * max(1, n / m) ** 0.5 * X
            theirs[j].grad = g.clone()
        if torchs:
            torchs.step()
    walk(model, 4, by_hand, optimizer.step)
    for a, b, c in zip(ours, plain, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        if torchs:
            torch.testing.assert_close(a, c, atol=0.05, rtol=0)


def test_a_run_needs_nothing_of_torch_optim(run, prepared):
    """Its first object would load torch's compiler, which takes a second and more."""
    code = ('import runpy, sys; sys.argv = ["train.py", *sys.argv[1:]]; '
            f'runpy.run_path({os.path.join(HERE, "train.py")!r}); '
            'assert "torch._dynamo" not in sys.modules')
    subprocess.run([sys.executable, '-c', code, *TINY, '--max_iters=1'], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, 'PYTHONPATH': HERE})


# ------------------------------------------------------------------------------ the whole way

@pytest.mark.parametrize('kind', ['char', 'word', 'bpe'])
def test_the_whole_way(run, papers, kind):
    """Papers in, a trained model, text out, in a folder that holds nothing else."""
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer={kind}', '--vocab_size=300')
    result = run('train.py', *TINY, '--max_iters=60', '--eval_interval=30')
    lines = [line for line in result.out.splitlines() if line.startswith('step')]
    assert [line.split()[1] for line in lines] == ['0', '30', '60']
    assert re.fullmatch(r'step    30  train \d\.\d\d  val \d\.\d\d  \d\.\d\d bits/char  0m0\ds left',
                        lines[1])
    assert all(len(line) <= 80 for line in result.out.splitlines() if 'out' not in line)
    assert result.log[-1][4] < 0.8 * result.log[0][4]
    text = run('sample.py', '--max_new_tokens=50', '--start=Let $X', '--num_samples=2').out
    assert text.startswith('Let $X') and text.count('Let $X') >= 2


def test_the_result_is_the_best_weights_on_the_whole_validation_part(run, papers):
    """Token by token; on the screen, in log.csv, in the page and in the checkpoint."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300', '--val_fraction=0.3')
    result = run('train.py', *TINY, '--max_iters=40', '--eval_interval=10', '--learning_rate=0.2')
    best = min(result.log, key=lambda row: row[4])
    model, tokenizer, saved = gpt.load('out/ckpt.safetensors')
    model.eval()
    assert saved['step'] == best[0]
    ids = [i & 0xffff for i in result.val.tolist()]
    total = 0
    for start in range(0, len(ids) - 1, 16):  # as many blocks as fit, and what is left
        x, y = torch.tensor(ids[start:start + 17][:-1]), torch.tensor(ids[start:start + 17][1:])
        total += F.cross_entropy(model(x[None])[0], y, reduction='sum').item()
    bits = total / math.log(2) / (len(ids) - 1) * len(ids) / result.meta['val']['characters']
    assert saved['val_bpc'] == pytest.approx(bits, rel=1e-4)
    assert f'best of step {best[0]}, on the whole validation part: {bits:.3f}' in result.out
    with open('out/log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]['val_bpc']) == saved['val_bpc'] and int(rows[-1]['step']) == best[0]
    assert [int(row['step']) for row in rows[:-1]] == [0, 10, 20, 30, 40]
    assert numbers('out/run.html')['result'][5] == saved['val_bpc']


def test_evaluations_are_twenty_and_read_the_same_blocks(run, papers):
    """Evenly spaced ones, 2^14 tokens of them where there are more."""
    (papers / 'a.tex').write_text(corpus(5, 4000))
    run('prepare.py', '--source=mine', '--dataset=mine', '--tokenizer=char', '--val_fraction=0.4')
    result = run('train.py', *TINY, '--max_iters=40', '--eval_interval=0', '--batch_size=1')
    assert [row[0] for row in result.log] == list(range(0, 41, 2))
    starts = result.few_blocks
    assert len(starts) == 2**14 // 16 < len(result.every_block)
    gaps = starts.diff()
    assert starts[0] == 0 and starts[-1] == result.every_block[-1]
    assert (starts % 16 == 0).all() and gaps.max() - gaps.min() <= 16


def test_a_budget_is_kept_and_the_rate_falls_with_the_time(run, prepared):
    """Evaluations take a tenth of it at most; one that's over before a step says so."""
    result = run('train.py', *TINY, '--eval_interval=0', '--max_minutes=0.02', '--warmup_iters=0')
    assert 1.2 <= result.log[-1][2] < 1.6 and result.measuring < 0.3
    rates = [row[6] / result.learning_rate for row in result.log]
    for rate, row in zip(rates[1:], result.log[1:]):
        assert rate == pytest.approx(max(0, 1 - row[2] / 1.2), abs=0.15)
    assert 'take more' in run('train.py', *TINY, '--max_minutes=1e-9', code=2).err


def test_finetuning_goes_on_from_what_was_learned(run, papers, prepared):
    """The first loss is a trained model's; another tokenizer is refused."""
    first = run('train.py', *TINY, '--max_iters=60', '--eval_interval=60')
    os.rename('out', 'base')
    (papers / 'a.tex').write_text(corpus(7))
    base = 'base/ckpt.safetensors'
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer_from={base}')
    how = [argument for argument in TINY if 'block_size' not in argument]
    second = run('train.py', *how, f'--init_from={base}', '--out_dir=tuned')
    assert second.log[0][4] < first.log[0][4] - 1
    resumed = run('train.py', '--init_from=resume', '--out_dir=tuned', '--max_iters=9')
    assert resumed.i == 9 and resumed.block_size == resumed.model.config.block_size == 16
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=290')
    refused = run('train.py', *TINY, f'--init_from={base}', code=2)
    assert f'--tokenizer_from={base}' in refused.err


def after_step(monkeypatch, n, act):
    """Let act(model) happen after the n-th step. Returns the steps that were taken."""
    step, steps = gpt.Optimizer.step, []

    def stepped(self, *arguments):
        steps.append(step(self, *arguments))
        if len(steps) == n:
            act(self.model)
    monkeypatch.setattr(gpt.Optimizer, 'step', stepped)
    return steps


def interrupt(model):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize('kind', ['char', 'word', 'bpe'])
@pytest.mark.parametrize('extra', [(), ('--dropout=0.1', '--optimizer=adamw')])
def test_a_resumed_run_is_the_run_that_never_stopped(run, papers, monkeypatch, kind, extra):
    """Bit for bit: stopped by Ctrl-C in its fourth step, and resumed."""
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer={kind}', '--vocab_size=300')
    whole = run('train.py', *TINY, '--out_dir=whole', *extra)
    with monkeypatch.context() as patch:
        steps = after_step(patch, 4, interrupt)
        stopped = run('train.py', *TINY, '--out_dir=stopped', *extra, code=130)
    assert 'python train.py --init_from=resume --out_dir=stopped' in stopped.out
    resumed = run('train.py', '--init_from=resume', '--out_dir=stopped')
    assert len(steps) == 4 and 'resumed at step 4' in resumed.out
    for name, w in whole.model.state_dict().items():
        assert torch.equal(w, resumed.model.state_dict()[name])
    for a, b in zip(whole.log, resumed.log):
        assert a[:2] + a[3:] == b[:2] + b[3:]  # all but the seconds
    again = run('train.py', '--init_from=resume', '--out_dir=stopped')
    assert 'finished' in again.out


def test_a_resumed_run_has_its_own_settings_to_its_end(run, prepared):
    """How long and where may change; what would change its walk is refused by name."""
    run('train.py', *TINY, '--learning_rate=0.03', '--eval_interval=2')
    result = run('train.py', '--init_from=resume', '--max_iters=8')
    assert result.i == 8 and result.learning_rate == 0.03 and result.eval_interval == 2
    for argument in ('--learning_rate=0.02', '--batch_size=4', '--seed=1', '--dataset=papers'):
        name = argument.split('=')[0]
        assert name in run('train.py', '--init_from=resume', argument, code=2).err


def test_nothing_trained_is_overwritten(run, prepared):
    """A run that is there is moved aside, and the new one's page shows it."""
    first = run('train.py', *TINY)
    with open('out/ckpt.safetensors', 'rb') as file:
        before = file.read()
    run('train.py', '--dataset=nowhere', code=2)  # and not by one that can't begin
    assert 'out.1' in run('train.py', *TINY).out
    with open('out.1/ckpt.safetensors', 'rb') as file:
        assert file.read() == before
    assert numbers('out/run.html')['aside'] == dict(title='out.1', rows=first.log)


# ------------------------------------------------------------------------------ settings

@pytest.mark.parametrize('script, argument, hint', [
    ('train.py', '--bach_size=3', 'bach_size'), ('train.py', '--batch_size=x', 'int'),
    ('train.py', '--batch_size=0', '1 to'), ('train.py', '--dropout=nan', '0 to'),
    ('train.py', '--optimizer=sgd', 'muon'), ('sample.py', '--top_p=1.5', '0 to 1.0'),
    ('train.py', '--learning_rate=-1', '0 to'), ('train.py', '--max_iters=1e3', 'int'),
    ('train.py', '--compile=perhaps', 'compile'),
    ('train.py', '--position=left', 'rotary'), ('train.py', '--max_iters', 'max_iters'),
    ('train.py', 'config.py', 'config.py'), ('train.py', '--device=abacus', 'device'),
    ('train.py', '--device=meta', 'device'),
    ('train.py', '--seed=--', 'no value'), ('prepare.py', '--source=nowhere', 'nowhere'),
    ('prepare.py', '--val_fraction=2', '0.001 to'), ('sample.py', '--temperature=-1', '0 to'),
    ('sample.py', '--out_dir=nowhere', 'nowhere'), ('train.py', '--dataset=nowhere', 'prepare.py')])
def test_a_wrong_setting_ends_with_one_line(run, script, argument, hint):
    assert hint in run(script, argument, code=2).err


@pytest.mark.parametrize('argument, hint', [
    ('--n_head=7', 'n_head'), ('--head_dim=7', 'even'), ('--n_embd=0', 'above 0'),
    ('--block_size=65536', '2^26')])
def test_a_model_that_cannot_be_ends_with_one_line(run, prepared, argument, hint):
    how = ['--dataset=mine', '--n_embd=8192', '--n_head=1', argument]
    assert hint in run('train.py', *how, code=2).err


def test_what_does_not_fit_into_memory_is_said_in_one_line(run, prepared):
    code, out = ended(start('train.py', '--dataset=mine', '--n_embd=4000000', '--n_head=1000000'))
    assert code == 2 and out.count('\n') == 1 and '--n_embd' in out, out


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


# ------------------------------------------------------------------------------ seeing it think

def numbers(path):
    """What a page shows."""
    with open(path, encoding='utf-8') as file:
        page = file.read()
    elsewhere = r'http(?!://www.w3.org/)|src=|@import|url\('
    assert not re.search(elsewhere, page)
    start = page.index('const data = ') + len('const data = ')
    data, length = json.JSONDecoder().raw_decode(page[start:])
    assert '<' not in page[start:start + length]
    return data


def checkpoint(learned, **changes):
    """A model with weights that say something and a char tokenizer, in out."""
    tokenizer, model = gpt.CharTokenizer(list(learned)), small(vocab_size=len(learned), **changes)
    os.makedirs('out', exist_ok=True)
    gpt.save('out/ckpt.safetensors', model, tokenizer)
    return model, tokenizer


NASTY = ['</script>', '<!--', '<b>', '&amp;', '"', '\\', '\n', '\u2028', ' ', 'a', gpt.UNKNOWN]


@pytest.mark.parametrize('changes', [{}, dict(position='learned'), dict(n_layer=0)])
def test_the_attention_page_shows_the_models_own_numbers(run, tmp_path, changes):
    """Weights as computed from the first layer's W_Q and W_K, rows that sum to 1, and the
    probabilities of what comes next."""
    model, tokenizer = checkpoint('abcdefghi\n' + gpt.UNKNOWN, smear=False, **changes)
    run('sample.py', '--start=abacad', '--attention=a.html')
    page, idx = numbers('a.html'), torch.tensor([tokenizer.encode('abacad')])
    assert page['ids'] == idx[0].tolist()
    p = model(idx)[0].softmax(-1)
    for t, likely in enumerate(page['likely']):
        assert [x for _, x in likely] == sorted((x for _, x in likely), reverse=True)
        assert all(x == pytest.approx(p[t, i].item(), abs=1e-4) for i, x in likely)
        assert likely[0][0] == p[t].argmax()
    for t in range(1, 6):
        assert page['bits'][t] == pytest.approx(-p[t - 1, idx[0, t]].log2().item(), abs=0.01)
    if model.config.n_layer == 0:
        assert page['layers'] == []
        return
    weights = torch.tensor(page['layers'])  # (n_layer, H, T, T)
    assert weights.shape == (2, 2, 6, 6) and weights.triu(1).count_nonzero() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6), atol=1e-3, rtol=0)
    x = model.token(idx[0]) + (model.place.weight[:6] if 'position' in changes else 0)
    x = F.layer_norm(x, [16])
    layer = model.blocks[0].attention
    for h in range(2):
        q, k = (x @ w.weight[8 * h:8 * h + 8].T for w in (layer.query, layer.key))
        if 'position' not in changes:  # rotary: as complex numbers, times e^(i t / 10000^(2j/D))
            turn = torch.outer(torch.arange(6), 10_000.0 ** (-torch.arange(4) / 4))
            q, k = (torch.complex(*z.chunk(2, -1)) * torch.polar(torch.ones(6, 4), turn)
                    for z in (q, k))
        scores = (q @ k.mH).real if q.is_complex() else q @ k.T
        scores = scores / math.sqrt(8) + torch.full((6, 6), -math.inf).triu(1)
        torch.testing.assert_close(weights[0, h], scores.softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize('block_size', [1, 2, 5, 16])
@pytest.mark.parametrize('length', [2, 5, 16, 17, 41])
def test_the_score_of_a_text(run, tmp_path, block_size, length):
    """Bits per character, token by token: each given all of the window that it is scored in."""
    model, tokenizer = checkpoint('abcdefghi\n' + gpt.UNKNOWN, block_size=block_size)
    text = ''.join('abcdefghi\nz'[i * i % 11] for i in range(length))
    (tmp_path / 'text.tex').write_text(text)
    result = run('sample.py', '--text=text.tex', '--page=t.html')
    ids, bits, new = tokenizer.encode(text), [0], (block_size + 1) // 2
    for t in range(1, length):  # place t - 1 is read in window n, which begins at n * new
        n = max(0, -(-(t - block_size) // new))
        seen = torch.tensor([ids[n * new:t]])
        assert seen.size(1) == t if t <= block_size else seen.size(1) > block_size // 2
        bits.append(-model(seen)[0, -1].log_softmax(-1)[ids[t]].item() / math.log(2))
    assert f'{sum(bits) / (length - 1):.3f} bits per character' in result.out
    assert numbers('t.html')['bits'] == pytest.approx(bits, abs=0.006)


def test_hostile_tokens_stay_text(run, tmp_path):
    """Whatever a token is, the page has one script and no tag of the text's."""
    checkpoint(NASTY)
    (tmp_path / '<i>.tex').write_text('a a\n' * 9)
    run('sample.py', '--start=a a\n a', '--attention=a.html')
    run('sample.py', '--text=<i>.tex', '--page=t.html')
    for path in ('a.html', 't.html'):
        assert numbers(path)['tokens'] == NASTY
        page = (tmp_path / path).read_text(encoding='utf-8')
        assert page.count('</script>') == 1 and '<!--' not in page and '<i>' not in page
        assert '<b>' not in page and '\u2028' not in page
    bpe = gpt.BPETokenizer([])  # of which most tokens are a part of a character
    gpt.save('out/ckpt.safetensors', small(vocab_size=256), bpe)
    run('sample.py', '--start=\u00e9', '--attention=a.html')
    assert [numbers('a.html')['tokens'][i] for i in bpe.encode('\u00e9')] == ['\\xc3', '\\xa9']


@pytest.mark.parametrize('arguments, hint', [
    (['--page=p.html'], '--text'), (['--text=nowhere.tex'], 'nowhere.tex'),
    (['--text=one.tex'], 'too short'), (['--attention=no/where.html'], 'no/where.html'),
    (['--text=one.tex', '--page=one.tex'], 'ends in .html')])
def test_pages_fail_in_one_line(run, tmp_path, arguments, hint):
    checkpoint('abc\n' + gpt.UNKNOWN)
    (tmp_path / 'one.tex').write_text('a')
    assert hint in run('sample.py', *arguments, code=2).err


def test_without_its_page_a_run_goes_on_and_says_so_once(run, prepared, monkeypatch):
    monkeypatch.setattr(gpt, 'PAGE', 'nowhere/page.html')
    result = run('train.py', *TINY)
    assert result.out.count('nowhere/page.html') == 1 and not os.path.exists('out/run.html')
    assert 'nowhere/page.html' in run('sample.py', '--attention=a.html', code=2).err


# ------------------------------------------------------------------------------ nothing lost


@pytest.fixture
def base(run, papers):
    """A data set and a run of six steps in out."""
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    return run('train.py', *TINY)


def full(monkeypatch, when):
    """A disk that is full at the calls of fsync whose number `when` is true of."""
    fsync, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if when(len(calls)):
            raise OSError(28, 'No space left on device')
        fsync(descriptor)
    monkeypatch.setattr(os, 'fsync', failing)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(run, prepared, monkeypatch):
    """One line, and the run ends as it would have ended."""
    full(monkeypatch, lambda call: call == 5)
    result = run('train.py', *TINY, '--eval_interval=1')
    assert result.err.count('No space left on device') == 1 and 'Traceback' not in result.err
    assert parsed('out/last.safetensors')[0]['step'] == 6


def test_a_full_disk_at_the_end_is_said_and_leaves_what_was(run, prepared, monkeypatch):
    full(monkeypatch, lambda call: os.path.exists('out/last.safetensors'))
    assert run('train.py', *TINY, code=2, lines=5).err.count('No space left') == 4
    assert parsed('out/last.safetensors')[0]['step'] == 0


def test_a_folder_that_vanished_is_made_again(run, papers, monkeypatch):
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    after_step(monkeypatch, 4, lambda model: shutil.rmtree('out'))
    run('train.py', *TINY)
    assert parsed('out/last.safetensors')[0]['step'] == 6


def test_a_full_disk_leaves_the_old_data_set_whole(run, papers, prepared, monkeypatch):
    before = {path: open(path, 'rb').read() for path in glob.glob('data/mine/*')}
    full(monkeypatch, lambda call: call == 2)
    (papers / 'a.tex').write_text(corpus(9))
    run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300', code=2)
    assert {path: open(path, 'rb').read() for path in glob.glob('data/mine/*')} == before


@pytest.mark.parametrize('out_dir', ['file', 'file/x', 'x' * 300, ''])
def test_an_out_dir_that_cannot_be_is_refused(run, prepared, tmp_path, out_dir):
    (tmp_path / 'file').write_text('x')
    assert 'out_dir' in run('train.py', *TINY, f'--out_dir={out_dir}', code=2).err


@pytest.mark.parametrize('interval, stop', [(1, False), (6, False), (6, True)])
def test_a_loss_that_is_no_number_is_not_saved(run, prepared, monkeypatch, interval, stop):
    """At an evaluation, at a step, and where Ctrl-C comes in the step that broke the weights."""

    def poison(model):
        model.token.weight.data.fill_(math.nan)
        if stop:
            interrupt(model)
    after_step(monkeypatch, 3, poison)
    result = run('train.py', *TINY, f'--eval_interval={interval}', code=2)
    assert 'step 3' in result.err and 'rate' in result.err
    for name in ('ckpt', 'last'):
        _, tensors = parsed(f'out/{name}.safetensors')
        assert all(math.isfinite(x) for tensor in tensors.values() for x in tensor)


def test_a_second_run_in_the_same_folder_stops(base, run):
    """The lock is the system's: it goes with the process, however that ends."""
    with open('out/last.safetensors', 'rb') as file:
        before = file.read()
    other = subprocess.Popen([sys.executable, '-c', """if True:
        import sqlite3
        lock = sqlite3.connect('out/.lock')
        lock.execute('BEGIN EXCLUSIVE')
        print(flush=True)
        input()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    for how in (TINY, ('--init_from=resume', '--max_iters=9')):
        assert 'at work' in run('train.py', *how, code=2).err
    with open('out/last.safetensors', 'rb') as file:
        assert file.read() == before and not os.path.exists('out.1')
    other.kill()
    other.communicate()
    run('train.py', *TINY)


@pytest.mark.parametrize('name', ['ckpt.safetensors', 'last.safetensors', 'log.csv'])
def test_killed_between_two_renames_a_resumed_run_ends_the_same(base, run, monkeypatch, name):
    """os.replace dies on the way to `name` in the second evaluation."""
    whole, replace, calls = base.model.state_dict(), os.replace, []

    def dying(a, b):
        calls.append(b)
        if b.endswith(name) and sum(c.endswith(name) for c in calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', dying)
        try:
            run('train.py', *TINY, '--out_dir=cut')
        except KeyboardInterrupt:
            pass
    run('train.py', '--init_from=resume', '--out_dir=cut')
    saved, tensors = parsed('cut/last.safetensors')
    for key, w in whole.items():
        assert torch.equal(w.flatten(), torch.tensor(tensors[key]))
    with open('cut/log.csv', newline='') as file:
        assert len(list(csv.reader(file))) == 1 + len(saved['log']) + 1 == 5


# ------------------------------------------------------------------------------ checkpoints

def parsed(path):
    """A checkpoint by the format's description: what was saved, and lists of numbers by name."""
    with open(path, 'rb') as file:
        data = file.read()
    size, = struct.unpack('<Q', data[:8])
    header, numbers = json.loads(data[8:8 + size]), data[8 + size:]
    saved = {name: json.loads(text) for name, text in header.pop('__metadata__').items()}
    tensors, reached = {}, 0
    for name, entry in header.items():
        begin, end = entry['data_offsets']
        assert begin == reached and entry['dtype'] == 'F32' and size % 8 == 0
        tensors[name] = list(struct.unpack(f'<{(end - begin) // 4}f', numbers[begin:end]))
        assert len(tensors[name]) == math.prod(entry['shape'])
        reached = end
    assert reached == len(numbers)
    return saved, tensors


def written(path, saved, tensors):
    """A checkpoint by the format's description, of names, shapes and lists of numbers."""
    header, numbers = {'__metadata__': {k: json.dumps(v) for k, v in saved.items()}}, b''
    for name, (shape, values) in tensors.items():
        data = struct.pack(f'<{len(values)}f', *values)
        header[name] = dict(dtype='F32', shape=shape,
                            data_offsets=[len(numbers), len(numbers) + len(data)])
        numbers += data
    header = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(header)) + header + numbers)


@pytest.mark.parametrize('changes', [{}, dict(tied=True, bias=True), dict(n_layer=0)])
def test_a_checkpoint_is_a_safetensors_file(tmp_path, changes):
    """Read and written by a parser of the format's description; a tied table stands there once."""
    model, tokenizer = small(**changes), CharTokenizer.learn('abcdefghij')
    path = str(tmp_path / 'x')
    gpt.save(path, model, tokenizer, step=3, state={'mean': torch.ones(2)})
    saved, tensors = parsed(path)
    assert saved['step'] == 3 and tensors.pop('optimizer.mean') == [1, 1]
    assert sum(map(len, tensors.values())) == model.config.n_params
    assert tensors == {name: w.flatten().tolist() for name, w in model.named_parameters()}
    written(path, saved, {name: (list(w.shape), w.flatten().tolist())
                          for name, w in model.named_parameters()})
    again, known, saved = gpt.load(path)
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(idx), model(idx)) and saved['state'] == {} and saved['step'] == 3
    assert known.encode('jabba') == tokenizer.encode('jabba')


def test_the_docstring_says_how_to_read_a_checkpoint(base):
    """With json and struct alone."""
    code = re.search("        with open.*", gpt.save.__doc__, re.DOTALL).group()
    names = dict(struct=struct, json=json)
    exec(textwrap.dedent(code), names)
    best, _, _ = gpt.load('out/ckpt.safetensors')
    assert list(names['numbers']) == best.token.weight.flatten().tolist()


DOUBLING = [[97, 97]] + [[256 + i, 256 + i] for i in range(43)]
HOSTILE = {  # a path of keys in what was saved, and what stands there instead
    'layers': ('config', 'n_layer', 10**9), 'size': ('config', 'vocab_size', 10**12),
    'negative': ('config', 'n_embd', -16), 'block': ('config', 'block_size', 10**12),
    'zero': ('config', 'block_size', 0), 'word': ('config', 'block_size', 'x'),
    'float': ('config', 'block_size', 16.0), 'position': ('config', 'position', 'left'),
    'dropout': ('config', 'dropout', 2.0), 'wide': ('config', 'head_dim', 2**16),
    'unknown': ('config', 'colour', 1), 'kind': ('tokenizer', 0, 'no'),
    'double': ('tokenizer', 1, DOUBLING), 'range': ('tokenizer', 1, [[999, 1]] * 44),
    'short': ('tokenizer', 1, [[97, 98]]), 'many': ('tokenizer', 1, [[97, 98]] * 10**5)}
DAMAGED = {
    'settings': ('settings', []), 'setting': ('settings', 'learning_rate', 'x'),
    'seed': ('settings', 'seed', None), 'log': ('log', 'x'), 'row': ('log', [[]]),
    'step': ('step', -1), 'steps': ('step', '3'), 'half': ('step', 2.5), 'seconds': ('seconds', 'x'),
    'losses': ('losses', ['a'])}


def spoil(change):
    """Change one thing in both checkpoints of out."""
    *keys, last, value = change
    for name in ('ckpt', 'last'):
        model, tokenizer, saved = gpt.load(f'out/{name}.safetensors')
        shapes = {key: (list(w.shape), w.flatten().tolist())
                  for key, w in [*model.named_parameters(),
                                 *((f'optimizer.{key}', w) for key, w in saved.pop('state').items())]}
        inner = saved
        for key in keys:
            inner = inner[key]
        inner[last] = value
        written(f'out/{name}.safetensors', saved, shapes)


@pytest.mark.parametrize('what', HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_every_script(base, run, what):
    spoil(HOSTILE[what])
    for script, *how in (('sample.py',), ('train.py', '--init_from=resume'),
                         ('train.py', *TINY, '--init_from=out/ckpt.safetensors', '--out_dir=new'),
                         ('prepare.py', '--source=mine', '--tokenizer_from=out/ckpt.safetensors')):
        assert 'no checkpoint' in run(script, *how, code=2).err


@pytest.mark.parametrize('what', DAMAGED)
def test_a_damaged_state_is_not_resumed(base, run, what):
    spoil(DAMAGED[what])
    assert 'resumed' in run('train.py', '--init_from=resume', '--max_iters=9', code=2).err


@pytest.mark.parametrize('what', ['cut', 'empty', 'long', 'pickle', 'gap', 'overlap', 'shape', 'name',
                                  'missing', 'nan', 'inf', 'state'])
def test_a_checkpoint_that_is_none_is_refused(base, run, what):
    """Cut, longer than it says, of another kind, or with tensors that the model doesn't have."""
    saved, tensors = parsed('out/last.safetensors')
    with open('out/last.safetensors', 'rb') as file:
        data = file.read()
    with open('out/last.safetensors', 'rb') as file:
        header, _ = gpt.read_header(file)
    size = len(data) - 4 * sum(map(len, tensors.values()))
    shapes = {name: (entry['shape'], tensors[name]) for name, entry in header.items()}
    table = shapes['token.weight'][1]
    if what in ('cut', 'empty', 'long', 'pickle'):
        data = dict(cut=data[:-4], empty=b'', long=data + bytes(4), pickle=b'PK' + data)[what]
        with open('out/last.safetensors', 'wb') as file:
            file.write(data)
    elif what in ('gap', 'overlap'):
        first = header['token.weight']['data_offsets']
        moved = [x + (4 if what == 'gap' else -4) for x in first]
        old, new = (json.dumps(x).encode() for x in (first, moved))
        text = data[8:size].replace(old, new, 1)
        with open('out/last.safetensors', 'wb') as file:
            file.write(struct.pack('<Q', len(text)) + text + data[size:])
    else:
        shapes.update(dict(
            shape={'token.weight': ([16, 300], table)}, name={'colour': ([1], [1.0])}, missing={},
            nan={'token.weight': ([300, 16], [math.nan, *table[1:]])},
            inf={'token.weight': ([300, 16], [math.inf, *table[1:]])},
            state={'optimizer.mean.token.weight': ([1], [1.0])})[what])
        if what == 'missing':
            del shapes['head.weight']
        written('out/last.safetensors', saved, shapes)
    assert 'last.safetensors' in run('train.py', '--init_from=resume', code=2).err


@pytest.mark.parametrize('change', [
    dict(tokenizer='x'), dict(tokenizer={'kind': 'no', 'learned': []}), dict(train={}),
    dict(val=[]), dict(tokenizer={'kind': 'char', 'learned': ['a'] * 300}), dict(train=None),
    dict(tokenizer={'kind': 'bpe', 'learned': DOUBLING}), dict(yardsticks={})])
def test_a_meta_json_that_is_damaged_is_refused(base, run, change):
    with open('data/mine/meta.json') as file:
        meta = json.load(file)
    with open('data/mine/meta.json', 'w') as file:
        json.dump({**meta, **change}, file)
    assert 'prepare.py' in run('train.py', *TINY, '--out_dir=new', code=2).err


@pytest.mark.parametrize('meta', [b'', b'[]', b'{', b'[' * 200_000, bytes(range(256))])
def test_a_meta_json_that_is_none_is_refused(base, run, meta):
    with open('data/mine/meta.json', 'wb') as file:
        file.write(meta)
    assert 'prepare.py' in run('train.py', *TINY, '--out_dir=new', code=2).err


@pytest.mark.parametrize('name', ['train', 'val'])
@pytest.mark.parametrize('cut', [None, 0, -1, -2])
def test_a_data_set_that_is_not_whole_is_refused(base, run, name, cut):
    """A part that's gone, empty, or short of what meta.json says."""
    with open(f'data/mine/{name}.bin', 'rb') as file:
        data = file.read()[:cut]
    os.remove(f'data/mine/{name}.bin')
    if cut is not None:
        with open(f'data/mine/{name}.bin', 'wb') as file:
            file.write(data)
    assert f'{name}.bin' in run('train.py', *TINY, '--out_dir=new', code=2).err


def test_a_text_shorter_than_a_block_is_learned_all_the_same(run):
    """What is beyond its end counts for nothing."""
    with open('few.tex', 'w') as file:
        file.write(corpus(5, 20))
    run('prepare.py', '--source=few.tex', '--dataset=mine', '--vocab_size=300')
    result = run('train.py', *TINY, '--block_size=2048', '--batch_size=2')
    (x, y), = result.get_batch(0)
    assert x.shape == y.shape == (2, 2048) and (y >= 0).sum() == 2 * (len(result.train) - 1)
    assert result.log[-1][4] < result.log[0][4]


@pytest.mark.parametrize('codec', ['undefined', 'idna', 'unicode_escape', 'utf-7', 'rot13',
                                   'punycode'])
def test_no_declared_encoding_breaks_or_gives_half_a_character(run, tmp_path, codec):
    data = b'\\usepackage[%s]{inputenc} \\ud800 +2AA- \xff\n' % codec.encode()
    (tmp_path / 'a.tex').write_bytes(data * 9)
    run('prepare.py', '--source=a.tex', '--tokenizer=char').text.encode()


def test_nothing_is_written_where_an_archive_says(run, tmp_path, papers):
    """../ and absolute names are names; links, devices, bombs and lies are skipped."""
    one = corpus(3).encode()
    archive(papers / 'x.zip', 'zip', {'../../up.tex': one, str(tmp_path / 'abs.tex'): one + b'.'})
    with tarfile.open(papers / 'y.tar', 'w') as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo('link.tex')
            link.type, link.linkname = kind, '/etc/passwd'
            tar.addfile(link)
    (papers / 'z.gz').write_bytes(gzip.compress(bytes(2**27), 1))
    result = run('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
    assert 'root:' not in result.text and not (tmp_path / 'abs.tex').exists()
    assert sorted(os.listdir(tmp_path)) == ['data', 'mine']
    assert 'z' in [row['path'][-1] for row in result.sources if row['status'] == 'skipped']


@pytest.mark.parametrize('script, how', [
    ('sample.py', ['--start=\udcff']), ('prepare.py', ['--source=mine', '--dataset=\udcff'])])
def test_bytes_that_are_no_text_are_printed_somehow(base, run, script, how):
    run(script, *how)


@pytest.mark.parametrize('kind', gpt.TOKENIZERS)
def test_every_prompt_is_gone_on_from(run, prepared, kind):
    """Empty, longer than the window, of unknown characters, of bytes that are no text."""
    text = corpus(1, 50)
    tokenizer = gpt.TOKENIZERS[kind].learn(text, 300)
    gpt.save('ckpt.safetensors', small(vocab_size=len(tokenizer.tokens)), tokenizer)
    for start in '', 'x' * 999, '\u0416', 'FILE:data/mine/train.bin', 'FILE:/dev/null', '\udcff':
        assert run('sample.py', '--out_dir=.', '--max_new_tokens=20', f'--start={start}').out
    for bad in 'FILE:', 'FILE:mine', 'FILE:no\nwhere':
        assert 'start' in run('sample.py', '--out_dir=.', f'--start={bad}', code=2).err


# ------------------------------------------------------------------------------ more than one

def test_two_processes_walk_the_path_of_one(run, prepared, tmp_path):
    """torchrun with two ranks: the same losses up to rounding, one set of files, exit code 0."""
    how = [*TINY, '--dropout=0', '--threads=1']
    one = run('train.py', *how, '--out_dir=one')
    code, out = ended(start('train.py', *how, '--out_dir=two', launcher=TWO))
    assert code == 0, out
    assert out.count('step     6') == 1
    for a, b in zip(one.log, parsed('two/last.safetensors')[0]['log']):
        assert a[3:7] == pytest.approx(b[3:7], abs=1e-4)
    assert 'finished' in run('train.py', '--init_from=resume', '--out_dir=two').out


# ------------------------------------------------------------------------------ the torture

FAST = ['--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=4',
        '--threads=1', '--dataset=mine', '--dropout=0.1']


def start(script, *arguments, launcher=(sys.executable,)):
    return subprocess.Popen([*launcher, os.path.join(HERE, script), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            errors='replace')


TWO = (sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2')


def ended(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def whole(folder):
    """Both checkpoints load, no row of the log is torn. Returns the newest state."""
    saved = [gpt.load(path) for path in glob.glob(f'{folder}/ckpt.safetensors')
             + glob.glob(f'{folder}/last.safetensors')]
    for path in glob.glob(f'{folder}/log.csv'):
        with open(path, newline='') as file:
            assert all(len(row) == 7 for row in csv.reader(file))
    return saved[-1] if saved else None


def torture_kill(n=100):
    """Killed at n moments, saving among them, every run ends bit for bit as if never stopped."""
    chance, kills = random.Random(0), 0
    for round, kind in enumerate(3 * ['char', 'word', 'bpe'], 1):
        assert ended(start('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer={kind}',
                           '--vocab_size=300'))[0] == 0
        shutil.rmtree('whole', ignore_errors=True)
        began = time.time()
        settings = [*FAST, '--max_iters=300', '--eval_interval=1']

        def go_on():
            return ['--init_from=resume'] if os.path.exists('out/last.safetensors') else settings

        def same():
            model, _, saved = whole('out')
            for name, w in expected[0].state_dict().items():
                assert torch.equal(w, model.state_dict()[name])
            assert [row[3:] for row in saved['log']] == [row[3:] for row in expected[2]['log']]
            shutil.rmtree('out')
        assert ended(start('train.py', *settings, '--out_dir=whole'))[0] == 0
        most, expected = time.time() - began, whole('whole')
        shutil.rmtree('out', ignore_errors=True)
        while kills < round * n / 9:
            process = start('train.py', *go_on())
            try:
                process.communicate(timeout=chance.uniform(0.2, 0.5) * most)
                same()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                whole('out')
        assert ended(start('train.py', *go_on()))[0] == 0
        same()
    return f'{kills} kills, all runs ended the same'


def torture_prepare(n=30):
    """Killed anywhere, the next start finds one whole data set."""
    for i in range(n):
        with open('mine/a.tex', 'w') as file:
            file.write(corpus(i))
        process = start('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
        time.sleep(random.Random(i).uniform(1, 3))
        process.kill()
        process.communicate()
        assert ended(start('prepare.py', '--source=nowhere', '--dataset=mine'))[0] == 2
        code, out = ended(start('train.py', *FAST, '--max_iters=0', f'--out_dir=p{i}'))
        assert code == 0 and not glob.glob('data/*.*'), out
    return f'{n} kills'


def torture_ranks():
    """torchrun with a rank killed ends all ranks, and leaves whole files and no lock."""
    for victim in (0, 1):
        shutil.rmtree('ranks', ignore_errors=True)
        process = start('train.py', *FAST, '--max_iters=1000000', '--eval_interval=20',
                        '--out_dir=ranks', launcher=TWO)
        time.sleep(20)
        children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True,
                                  text=True).stdout.split()
        os.kill(int(children[victim]), signal.SIGKILL)
        assert ended(process)[0] and whole('ranks')[2]['step'] > 0
        assert not subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True).stdout
        resumed = start('train.py', '--init_from=resume', '--out_dir=ranks', '--max_iters=1')
        assert ended(resumed)[0] == 0
    return 'all ranks ended'


def torture_bombs():
    """10 GB of zeros in a gz, a tar.gz (its file, its header) and a zip: skipped in seconds, in
    bounded memory."""
    import resource  # there is none on Windows
    os.makedirs('bombs', exist_ok=True)
    with open('bombs/a.tex', 'w') as file:
        file.write(corpus())
    for name, kind in (('x.gz', None), ('x.tar.gz', tarfile.REGTYPE), ('y.tgz', tarfile.XHDTYPE),
                       ('z.tgz', tarfile.GNUTYPE_LONGNAME)):
        head = tarfile.TarInfo('a.tex')
        head.size, head.type = 10 * 2**30, kind
        with gzip.open(f'bombs/{name}', 'wb', 1) as file:
            file.write(head.tobuf() if kind else b'x')
            for _ in range(10 * 2**10):
                file.write(bytes(2**20))
    with zipfile.ZipFile('bombs/x.zip', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for i in range(10):
            with bomb.open(f'{i}.tex', 'w', force_zip64=True) as file:
                for _ in range(2**10):
                    file.write(bytes(2**20))
    code, out = ended(start('prepare.py', '--source=bombs', '--dataset=bombs', '--vocab_size=300'))
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    most //= 2**20 if sys.platform == 'darwin' else 2**10
    assert code == 0 and 'read         1 files' in out and most < 800, (out, most)
    assert all(f'bombs/{name}' in out for name in os.listdir('bombs') if name != 'a.tex'), out
    return f'skipped, at most {most} MB'


def torture_long():
    """20,000 steps and 100,000 tokens without growth of memory."""
    def grown(script, *how):
        process, seen = start(script, *how), []
        reader = threading.Thread(target=process.stdout.read)
        reader.start()
        while process.poll() is None:
            with open(f'/proc/{process.pid}/statm') as file:
                seen.append(int(file.read().split()[1]) * 4 // 1024)
            time.sleep(0.5)
        reader.join()
        assert process.returncode == 0
        seen = seen[len(seen) // 3:-1]
        assert max(seen) < min(seen) + 30, seen
        return f'{min(seen)} to {max(seen)} MB'
    return (grown('train.py', *FAST, '--max_iters=20000', '--eval_interval=1000', '--out_dir=long'),
            grown('sample.py', '--out_dir=long', '--max_new_tokens=100000'))


def torture():
    """All that takes minutes, in a folder of its own: python test_gpt.py --torture"""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.makedirs('mine')
        for name in ('a', 'b'):
            with open(f'mine/{name}.tex', 'w') as file:
                file.write(corpus(ord(name)))
        prepared = start('prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300')
        assert ended(prepared)[0] == 0
        for name, function in list(globals().items()):
            if name.startswith('torture_'):
                print(f'{function.__doc__.strip()}\n    {function()}', flush=True)


if __name__ == '__main__' and '--torture' in sys.argv:
    torture()
