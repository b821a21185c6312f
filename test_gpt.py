r"""
What the README and the code claim, each claim proved by running it, in the order in which one
would teach it: papers, characters, batches, the bigram model, attention, the GPT, its training.

    python -m pytest
    python test_gpt.py --torture     a hundred kills, which take some minutes
"""
import csv
import doctest
import gc
import glob
import gzip
import itertools
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
import time
import zipfile
from array import array
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gpt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from arxiv_latex_cleaner import arxiv_latex_cleaner
from gpt import BPETokenizer, CharTokenizer, GPT, GPTConfig, WordTokenizer
from torch.testing import assert_close

HERE = Path(__file__).resolve().parent
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


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script as a user would, in a folder of its own: run('train.py', '--max_iters=3')."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, 'fused_attention', gpt.fused_attention)  # sample.py replaces it
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE
    handlers = [signal.getsignal(number) for number in numbers]
    gc.collect()
    gc.freeze()  # so that it takes no time to collect what a script leaves behind

    def run(script, *arguments, code=0):
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        gc.collect()
        names, ended = {}, 0
        try:
            try:
                names = runpy.run_path(str(HERE / script), run_name='__main__')
            except Exception:  # what a user sees of it
                sys.excepthook(*sys.exc_info())
        except SystemExit as end:
            ended = end.code or 0
        sys.excepthook = sys.__excepthook__
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        if names.get('lock'):
            names['lock'].close()  # as the end of the process does
        out, err = capsys.readouterr()
        assert ended == code, err or out
        assert 'Traceback' not in err
        return SimpleNamespace(out=out, err=err, **names)

    return run


@pytest.fixture
def refused(run):
    """What a script says that can't do what a user wants: one line, and the exit code is 2."""
    def refused(*command):
        said = run(*command, code=2).err
        assert len(said.splitlines()) == 1, said
        return said
    return refused


@pytest.fixture
def at_call(monkeypatch):
    """Let something happen before some calls of a function, counted from 1."""
    def at_call(owner, name, calls, act):
        function, count = getattr(owner, name), itertools.count(1)

        def counted(*arguments, **how):
            if next(count) in calls:
                act(*arguments)
            return function(*arguments, **how)

        monkeypatch.setattr(owner, name, counted)

    return at_call


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


def disk_full(*_):
    raise OSError(28, 'No space left on device')


TINY = ('--n_layer=1', '--n_embd=16', '--n_head=2', '--block_size=16', '--batch_size=8',
        '--max_iters=6', '--eval_interval=3', '--bigram_iters=0', '--dataset=mine')
PREPARE = 'prepare.py', '--source=mine', '--dataset=mine', '--vocab_size=300'


def spawn(script, *arguments, launcher=(), code=0, timeout=300):
    """Run a script as a process of its own, which is killed when its time is over."""
    process = subprocess.run([sys.executable, *launcher, HERE / script, *arguments],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors='replace', timeout=timeout)
    assert process.returncode == code, process.stdout
    return process.stdout


def write_papers(**seeds):
    os.makedirs('mine', exist_ok=True)
    for name, seed in seeds.items():
        Path('mine', f'{name}.tex').write_text(corpus(seed))


def held(folder):
    """What the files of a folder hold."""
    return {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope='session')
def workshop(tmp_path_factory):
    """Two papers in mine, their data set in data, a run of six steps in out: made once."""
    folder, before = tmp_path_factory.mktemp('workshop'), os.getcwd()
    os.chdir(folder)
    write_papers(a=1, b=2)
    spawn(*PREPARE)
    spawn('train.py', *TINY, '--threads=1')
    os.chdir(before)
    return folder


@pytest.fixture
def papers(workshop, tmp_path):
    """A folder of two papers and its data set; returns the folder."""
    for name in 'mine', 'data':
        shutil.copytree(workshop / name, tmp_path / name)
    return tmp_path / 'mine'


@pytest.fixture
def base(workshop, papers, tmp_path):
    """And a run of six steps in out."""
    shutil.copytree(workshop / 'out', tmp_path / 'out')


def small(**changes):
    """A model with weights that say something."""
    torch.manual_seed(0)
    shape = dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**shape, **changes}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


# ------------------------------------------------------------------------------ papers into text

@pytest.fixture
def clean(run):
    """What prepare.py makes of a paper."""
    def clean(text):
        Path('paper.tex').write_bytes(text if isinstance(text, bytes) else text.encode())
        how = '--source=paper.tex', '--tokenizer=char', '--val_fraction=0.5'
        return run('prepare.py', *how).text
    return clean


@pytest.mark.parametrize('paper, text', [
    ('one%\n\ntwo', 'one\n\ntwo'),
    ('one%\n% no\n   two', 'onetwo'),
    ('one\n\t % no\ntwo', 'one\ntwo'),
    ('one\n\n% no\n\n  two', 'one\n\n  two'),
    ('one\n\n\\iffalse no \\fi\n\ntwo', 'one\n\ntwo'),
    ('\\small% no\n  one \\small%\n$x$', '\\small one \\small$x$'),
    ('a\\\\% no\nb \\% c', 'a\\\\b \\% c'),
    ('one\n\\begin{comment}\n\\verb|no\n\\end{comment}\ntwo% | no', 'one\ntwo'),
    ('% \\begin{verbatim}\nx % no\n% \\end{verbatim}\ny', 'x y'),
    ('\\begin{verbatim}\nx % no\n\\begin{verbatim}\n%\n\\end{verbatim}',
     '\\begin{verbatim}\nx \\begin{verbatim}\n%\n\\end{verbatim}')])
def test_comments_end_as_in_tex(clean, paper, text):
    """They go with the end of their line, but not with that of a paragraph or a control word."""
    assert clean(f'begin\n\n{paper}\n\nend') == f'begin\n\n{text}\n\nend'


LISTING = '\\begin{verbatim}\n% a \\iffalse\n  \\end{document}\n\\end{verbatim}'


@pytest.mark.parametrize('verbatim', [
    *(LISTING.replace('verbatim', name)
      for name in ('verbatim', 'verbatim*', 'BVerbatim', 'lstlisting', 'alltt')),
    '\\begin{minted}[x=%]{tex}\n\\\\% a\n\\end{minted}', '\\verb|\\iffalse| b \\verb*+%\\fi+',
    '\\lstinline[x=y]!%! \\lstinline{{%}} \\mintinline{c}|%|', '\\url{a%b} \\url|%|',
    '\\href{a%b\\#}{c} \\href {%20} {c} \\nolinkurl{%}', '\\path{%}'])
def test_what_is_verbatim_stays_as_it_is(clean, verbatim):
    text = clean(f'begin\n\n{verbatim} % no\n\\iffalse no\\fi end, the end')
    assert text == f'begin\n\n{verbatim} end, the end'


def test_preambles_and_what_tex_never_reads_go(clean):
    """A file of joined papers keeps them all, without preambles and what is between them; macros
    are kept in meta.json, where they are whole and don't name themselves."""
    listing = '\\begin{verbatim}\n\\end{document}\n\\documentclass{x}\n\\end{verbatim}'
    macros = ['\\newcommand{\\R}{\\mathbb{R}}', '\\newcommand*\\e[1]{\\|#1\\epsilon\\}}',
              '\\DeclareMathOperator{\\Hom}{Hom}']
    preamble = '\n'.join(macros) + '\\newcommand{\\x}{a\\x}'
    first = PAPER.replace('The end', listing).replace('% a class', preamble)
    text = clean(f'never\n{first}never\n{PAPER}never\n\\begin{{document}}Third.\n\\endinput\n'
                 'never\n\\documentstyle{never}\n\\begin{document}Fourth')
    for there in listing, 'The end.', 'Third.', 'Fourth':
        assert there in text
    assert 'never' not in text and text.count('\\documentclass') == 1
    assert json.loads(Path('data/papers/meta.json').read_text())['macros'] == macros


def test_repeated_paragraphs_are_dropped(clean):
    long = 'This paragraph is an introduction which the author used again. ' * 3
    more = ' '.join(map(str, range(999)))
    text = clean(f'{long}\n\nshort\n\n{long}\n\nshort\n\n{more}')
    assert text.count(long.strip()) == 1 and text.count('short') == 2


@pytest.mark.parametrize('data, word', [
    ('caf\u00e9 \u201cau lait\u201d'.encode(), 'caf\u00e9 \u201cau lait\u201d'),
    ('caf\u00e9 \u201cau lait\u201d'.encode('cp1252'), 'caf\u00e9 \u201cau lait\u201d'),
    (b'%\\usepackage[latin1]{inputenc}\n\\usepackage[cp1250]{inputenc} \xe8esky', '\u010desky'),
    (b'\\usepackage[x,koi8-r]{inputenc} \xf4', '\u0422'),
    (b'\\inputencoding{iso88595} \xc2', '\u0422'),
    (b'\\usepackage[undefined]{inputenc} \xe9', '\u00e9'),
    (b'\\usepackage[utf-7]{inputenc} +2AA- \xe9', '+2AA- \u00e9'),
    (b'caf\xc3\xa9\n% caf\xe9', 'caf\u00e9\nsome'),
    (b'caf\xc3\xa9\rcaf\xe9', 'caf\u00e9\ncaf\u00e9\nsome'),
    (b'\xef\xbb\xbfwith a mark', 'with a mark'),
    ('\u03b4 small'.encode('utf-16'), '\u03b4 small'),
    (b'one\r\ntwo\rthree\r\r\nfour', 'one\ntwo\nthree\nfour')])
def test_every_encoding_is_read(clean, data, word):
    """Line by line, where a file isn't UTF-8 as a whole."""
    text = clean(data + b'\nsome text after it\n')
    assert word in text
    assert text.startswith(word) or b'input' in data


@pytest.mark.parametrize('kind, name', [
    ('zip', 'p.zip'), ('tar', 'p.tar'), ('bztar', 'p.tar.bz2'), ('xztar', 'p.txz'),
    ('gztar', '2101.00001v1'), ('zip', 'wrong.tar')])
def test_archives_give_what_the_folder_gives(run, kind, name):
    """By their first bytes, also within another. So does arXiv's gzip of one bare file."""
    paper = 99 * b'% a remark\n' + corpus(1).encode()
    os.makedirs('folder/deep')
    Path('folder/deep/PAPER.TEX').write_bytes(paper)
    Path('2101.00002').write_bytes(gzip.compress(paper))
    os.rename(shutil.make_archive('made', kind, 'folder'), name)
    with zipfile.ZipFile('outer.zip', 'w') as outer:
        outer.write(name, f'in/{name}')
    for source in name, 'outer.zip', 'folder', '2101.00002':
        text = run('prepare.py', f'--source={source}', '--vocab_size=300').text
        assert text == corpus(1).strip()


NO_LATEX = {'HTML': ' <html lang="en">', 'RTF': '{\\rtf1', 'PDF': '%PDF-1.5',
            'PostScript': '%!PS-Adobe-3.0', 'git_lfs': 'version https://git-lfs.com',
            'binary': 'x\0' * 999}
AMISS = {'deep.tex': '\\ifx' * 5000 + '\\fi' * 5000 + ' the text stays\n',
         'crashed.tex': corpus(3) + '\0' * 999, 'empty.tex': '', '2101.00002': 'x', 'no.TGZ': 'x',
         'a.txt': 'x', 'x.png': '', 'y.PNG': ''}


def test_a_bad_file_costs_one_file(run, papers):
    """Its place in the summary says why; what nobody expects to be a paper is counted. The source
    is never written to."""
    for name, text in AMISS.items():
        (papers / name).write_text(text)
    for kind, text in NO_LATEX.items():
        (papers / f'{kind}.tex').write_text(text)
    (papers / 'cafe.tex').write_bytes(b'caf\xe9')
    (papers / 'cut.tar.gz').write_bytes(gzip.compress(b'x' * 9000)[:20])
    (papers / 'link').symlink_to('..')
    before = held(papers)
    result = run(*PREPARE)
    assert held(papers) == before
    for said in ('skipped: mine/empty.tex', 'skipped: mine/cut.tar.gz', 'mine/link (a link',
                 '/2101.00002 (no', '/no.TGZ (no', 'stripped: mine/deep.tex',
                 '5 files, 11 skipped', 'not LaTeX: 2 .png, 1 .txt', '4 in utf-8, 1 in cp1252',
                 *(f'skipped: mine/{kind}.tex ({kind}, not LaTeX)' for kind in NO_LATEX)):
        assert said in result.out
    assert 'the text stays' in result.text and 'html' not in result.text


def test_nothing_is_written_where_an_archive_says(run, papers):
    """../ and absolute names are names; links, devices and bombs are skipped."""
    with zipfile.ZipFile('mine/x.zip', 'w') as archive:
        for name in '../../up.tex', os.path.abspath('abs.tex'):
            archive.writestr(name, corpus(3) + name)
    Path('mine/bomb.gz').write_bytes(65 * gzip.compress(b'x' * 2**24, 1))
    for kind in b'1236xL':  # links, devices, and names that are said to be long
        member = tarfile.TarInfo('a.tex')
        member.type, member.linkname, member.size = bytes([kind]), '/etc/passwd', 2**32
        Path(f'mine/{kind}.tar').write_bytes(member.tobuf())
    result = run(*PREPARE)
    assert 'root:' not in result.text and sorted(os.listdir()) == ['data', 'mine']
    for said in '4 files, 7 skipped', 'bomb.gz (larger than 1 GB)':
        assert said in result.out


# ------------------------------------------------------------------------------ text into tokens

AWKWARD = ['', 'x', 'Gau\u00df, Poincar\u00e9', '\U0001f600', 'a\r\nb', '\\', '\\\\%', '\ufffd',
           ' \t\n\n  x', '\\begin{a_1}^2$\\,$', '\u0394' * 100, '\\' + 'a' * 200, '%' * 99]


@pytest.mark.parametrize('kind, size', [
    (CharTokenizer, 20), (WordTokenizer, 20), (BPETokenizer, 300)])
def test_decode_undoes_encode(kind, size):
    """On whatever a tokenizer has learned; what it hasn't, only bytes can say."""
    limited = kind.learn(PAPER, size)
    assert len(limited.tokens) == size
    for text in AWKWARD:
        tokenizer = kind.learn(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        again = limited.decode(limited.encode(text))
        assert again == text or '\ufffd' in again and kind is not BPETokenizer


def test_bpe_merges_the_most_frequent_pair_as_counted():
    """Every merge is the most frequent pair at its time, by counting anew; a text is encoded by
    the same merges in the same order."""
    text = corpus(3, 60)
    tokenizer = BPETokenizer.learn(text, 256 + 60)
    words = list(gpt.pieces(text))  # in which chr(i) is token i
    for n, (a, b) in enumerate(tokenizer.learned, 256):
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        assert count[chr(a), chr(b)] == max(count.values())
        words = [word.replace(chr(a) + chr(b), chr(n)) for word in words]
    assert n == 256 + 59
    assert tokenizer.encode(text) == [*map(ord, ''.join(words))]


def test_pieces_are_latex():
    """No control sequence is cut, and common ones become single tokens."""
    pieces = gpt.pieces('\\alpha_1\\,x \\\\%\n\n  a')
    assert '|'.join(pieces) == '\\alpha|_|1|\\,|x| |\\\\|%|\n\n  |a'
    assert {b'\\alpha', b' compact'} <= {*BPETokenizer.learn(corpus(4), 512).tokens}


def test_text_streams_by_whole_characters():
    parts = BPETokenizer([]).stream('\u03b4\U0001f600!'.encode())
    assert list(parts) == ['', '\u03b4', '', '', '', '\U0001f600', '!', '']


def test_the_papers_that_come_along_come_back(run):
    """Every file of papers/ goes through the cleaner, and the tokens say all of it."""
    result = run('prepare.py', f'--source={HERE}/papers', '--vocab_size=300')
    assert len(result.papers) == len(glob.glob(f'{HERE}/papers/*.tex'))
    assert {row['status'] for row in result.sources} == {'cleaned'}
    assert len(result.text) > 500_000 and '%' not in result.text.replace('\\%', '')
    assert result.tokens.decode(result.every) == result.text
    assert result.out.endswith('next: python train.py\n')


# ------------------------------------------------------------------------------ data and batches

def test_the_data_set_is_described_and_split(run, papers):
    """The last tenth of the characters validates; the files are what meta says."""
    result = run(*PREPARE, '--tokenizer=char')
    meta = json.loads(Path('data/mine/meta.json').read_text())
    cut = int(0.9 * len(result.text))
    parts = dict(train=result.text[:cut], val=result.text[cut:])
    for name, part in parts.items():
        ids = array('H', Path(f'data/mine/{name}.bin').read_bytes())
        assert result.tokens.decode(ids) == part
        assert (meta[name]['tokens'], meta[name]['characters']) == (len(ids), len(part))
    assert f'{len({*result.text})} different' in result.out and '--init_from=' in result.out


def test_papers_are_in_an_order_that_no_name_changes(run, papers):
    """And another paper changes it nowhere else."""
    def prepared():
        return run(*PREPARE).text.split('\n\n')

    before = prepared()
    os.rename('mine/a.tex', 'mine/z.tex')
    assert prepared() == before
    write_papers(c=3)
    assert [paper for paper in prepared() if paper in before] == before


def test_validation_leaves_out_what_stands_in_training(run):
    """A paragraph of the last part that stands before it but for a word and a line end."""
    chance = random.Random(0)
    paragraphs = [' '.join(chance.choices(WORDS, k=30)) for _ in range(100)]
    again = 'Another\n' + paragraphs[0].partition(' ')[2]
    Path('a.tex').write_text('\n\n'.join([*paragraphs, again]))
    result = run('prepare.py', '--source=a.tex', '--vocab_size=300')
    assert result.text == '\n\n'.join(paragraphs)
    assert result.meta['left_out'] == len('\n\n' + again)


def test_the_yardsticks_by_hand(run, papers):
    """After the text 0 0 1 a zero has the probability 1/2, 3/5 or 1/3, and then one more 1/2, 3/5
    or 1/2. And xz by xz."""
    result = run(*PREPARE)
    bits = result.yardsticks([0, 0, 1], [0, 0], 2)
    assert 2 ** -bits['uniform'] == pytest.approx(1 / 2 * 1 / 2)
    assert 2 ** -bits['unigram'] == pytest.approx(3 / 5 * 3 / 5)
    assert 2 ** -bits['bigram'] == pytest.approx(1 / 3 * 1 / 2)
    stick = result.meta['yardsticks']['xz'] * len(result.val)  # is per character
    known, whole = result.train.encode(), result.text.encode()
    n = len(lzma.compress(whole)) - len(lzma.compress(known))
    assert stick == pytest.approx(8 * n)


def test_a_swap_cut_short_is_put_right(refused, papers):
    """Killed between its two renames, or before or after them, it leaves one whole data set."""
    for left, there in ('.old', True), ('.tmp', True), ('.old', False):
        shutil.copytree('data/mine', f'data/mine{left}')
        if not there:
            shutil.rmtree('data/mine')
        refused('prepare.py', '--source=nowhere', '--dataset=mine')
        assert os.listdir('data') == ['mine'] and len(os.listdir('data/mine')) == 3


def test_a_folder_that_holds_anything_else_is_never_replaced(refused, papers):
    """Neither the papers themselves nor what has the name of a half-written data set."""
    os.makedirs('data/x.old/work')
    for name in '../mine', 'x':
        said = refused('prepare.py', '--source=mine', f'--dataset={name}')
        assert 'holds more' in said
    assert os.path.exists('data/x.old/work') and len(os.listdir('mine')) == 2


def test_a_signal_leaves_no_copy_of_a_paper(run, papers, monkeypatch):
    os.mkdir('temporary')
    monkeypatch.setattr(tempfile, 'tempdir', os.path.abspath('temporary'))
    monkeypatch.setattr(arxiv_latex_cleaner, 'run_arxiv_cleaner',
                        lambda _: os.kill(os.getpid(), signal.SIGTERM))
    run(*PREPARE, code=128 + signal.SIGTERM)
    gc.collect()  # a process of its own would end here
    assert os.listdir('temporary') == []


def test_sequences_lie_evenly_in_the_text(run, papers):
    """However many have begun, the gaps between them have at most three lengths, and the widest
    is at most 2.62 times the narrowest. What follows a token is the token that follows it."""
    result = run('train.py', *TINY, '--max_iters=0')
    N = len(result.train)
    result.train.copy_(torch.arange(N))  # a text in which each token is its place
    batches = map(result.get_batch, range(N // 64))
    x, y = map(torch.cat, zip(*batches))  # (N / 8, 16) each
    assert torch.equal(y, x + 1) and (x.diff() == 1).all()
    assert len(x.unique()) > N - 16  # as many tokens as in two walks have read it all
    for n in 5, 8, 100, N // 16:
        ends = torch.cat((x[:n, 0], torch.tensor([N - 16])))
        gaps = ends.sort().values.diff()
        assert (gaps.unique().diff() > 2).sum() < 3  # whole tokens: so one more or less
        assert gaps.max() <= 2.62 * gaps.min() + 3


# ------------------------------------------------------------------------------ the bigram model

def test_the_bigram_model_reaches_the_entropy_of_its_corpus(run, papers):
    """--n_layer=0 begins at ln V and ends at what counting pairs gives. A run that starts from the
    counts nearly begins there."""
    run(*PREPARE, '--tokenizer=char')
    how = ('--dataset=mine', '--n_layer=0', '--n_embd=64', '--block_size=64', '--batch_size=32',
           '--weight_decay=0', '--max_iters=400', '--eval_interval=400')
    result = run('train.py', *how, '--bigram_iters=0')
    ids, V = result.train.long(), len(result.learned.tokens)
    a, b = ids[:-1], ids[1:]
    pairs = torch.bincount(a * V + b, minlength=V * V).view(V, V)
    entropy = F.cross_entropy(pairs.log()[a], b)  # the softmax of log n_ab is n_ab / n_a
    loss = F.cross_entropy(result.model(a[:, None])[:, 0], b)
    assert entropy < loss < 1.01 * entropy
    assert result.log[0]['val_loss'] == pytest.approx(math.log(V), abs=0.02)
    assert run('train.py', *how, '--max_iters=0').log[0]['val_loss'] < 1.2 * entropy


def test_all_pairs_at_once_are_the_bigram_model():
    """Three steps are those by the mean loss over the text, pair by pair. Where only some tokens
    are taken, they are the most frequent ones."""
    model, other = small(n_layer=0), small(n_layer=0)
    ids = torch.randint(11, (2, 5000)).amin(dim=0)  # 0 is the most frequent, then 1
    optimizer = gpt.Optimizer(other, 0.04)
    for t in 1, 2, 3:
        other.zero_grad()
        logits = other(ids[:-1, None])  # (N - 1, 1, V)
        F.cross_entropy(logits.mT, ids[1:, None]).backward()
        optimizer.step(t, share=t / 5)
    gpt.learn_pairs(model, ids, 3)
    assert_close([*model.parameters()], [*other.parameters()], atol=1e-4, rtol=0)
    gpt.learn_pairs(model, ids, 1, most=22)  # two rows
    changed = (model.token.weight - other.token.weight).abs() > 0.01
    assert changed.any(dim=1).tolist() == 2 * [True] + 9 * [False]


# ------------------------------------------------------------------------------ attention

@pytest.mark.parametrize('is_causal', [False, True])
def test_attention_is_torchs_own(is_causal):
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert_close(gpt.attention(q, k, v, is_causal), theirs)


def test_rotary_positions_are_relative():
    """Inner products of rotated vectors depend on the distance alone."""
    torch.manual_seed(0)
    same = torch.randn(2, 1, 8).expand(2, 200, 8)  # one query and one key, at each position
    q, k = gpt.rotate(same, 200)
    scores = q @ k.T
    one, later = scores[:-1, :-1], scores[1:, 1:]
    assert_close(one, later, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------ the GPT

ORIGINAL = dict(vocab_size=99, block_size=64, n_layer=4, n_head=4, n_embd=64, norm_weights=True,
                position='learned', activation='relu', bias=True, tied=False,
                value_embeddings=False, smear=False)


def test_the_two_sources_count_the_same_parameters():
    """99 characters, block 64, 4 layers, 4 heads, 64 channels: 216,163, as its author counted. The
    other counts the embedding, the matrices of attention and the MLP with biases."""
    assert GPTConfig(**ORIGINAL).n_params == 216_163
    config = GPTConfig(10_000, n_layer=6, n_head=4, n_embd=128, head_dim=32, mlp_dim=512,
                       activation='relu', position='none', tied=True, bias=False,
                       value_embeddings=False, smear=False)
    assert config.n_params + 6 * (512 + 128) == 2_463_488


def test_n_params_by_a_formula():
    """Without anything that is optional, and with all of it."""
    V, T, C, M, HD, L = 40, 9, 31, 7, 4 * 6, 3
    sizes = dict(vocab_size=V, block_size=T, n_layer=L, n_head=4, n_embd=C, head_dim=6, mlp_dim=M)
    bare = GPTConfig(**sizes, tied=True, value_embeddings=False, smear=False)
    full = GPTConfig(**sizes, position='learned', bias=True, norm_weights=True)
    assert bare.n_params == V * C + L * (4 * C * HD + 2 * C * M)
    values, smear, biases, norms = V * HD, HD, C + M + C, 2 * 2 * C
    in_blocks, ends = L * (values + smear + biases + norms), C + T * C + 2 * C + C * V + V
    assert full.n_params == bare.n_params + in_blocks + ends


@pytest.mark.parametrize('position', gpt.POSITIONS)
def test_the_future_changes_nothing(position):
    """Causality: another token leaves all logits before it as they are, and changes all others."""
    idx = torch.randint(11, (1, 16)).repeat(2, 1)
    idx[:, 7] = torch.tensor([1, 2])
    one, other = small(position=position)(idx)
    same = torch.isclose(one, other, atol=1e-5).all(dim=1)
    assert same.tolist() == 7 * [True] + 9 * [False]


def turned(x):
    """x (T, D) at its positions, as complex numbers: times e^(i t / 10000^(2j/D))."""
    T, D = x.shape
    slow = 10_000 ** (torch.arange(0, D, 2) / D)
    angle = torch.arange(T)[:, None] / slow
    z = torch.complex(*x.chunk(2, dim=1)) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), dim=1)


def smeared(x, share):
    """To each row of x (T, C) comes a share of the one before it."""
    return torch.cat((x[:1], x[1:] + share * x[:-1]))


def by_hand(model, idx):
    """A GPT of 16 channels, a head at a time: the logits (T, V) of a text idx (T,), and for each
    layer and head its weights (T, T).

    A share of the token before goes to each token and to each key, a table's row to each value.
    What the heads say, each through its own W_O, is summed and added; then what the MLP says.
    """
    c, T, layers = model.config, len(idx), []
    turn = turned if c.position == 'rotary' else torch.clone
    mask = torch.full((T, T), -math.inf).triu(1)
    x = model.token(idx)
    if c.smear:
        x = smeared(x, model.smear)
    if c.position == 'learned':
        x = x + model.place.weight[:T]
    for block in model.blocks:
        a, n = block.attention, F.layer_norm(x, [16])
        q, k = a.query(n), smeared(a.key(n), a.smear)
        v = a.value(n) + a.value_table(idx)
        layers.append([])
        for one in torch.arange(16).chunk(c.n_head):  # the channels of a head
            Q, K = turn(q[:, one]), turn(k[:, one])
            weights = (Q @ K.T / math.sqrt(c.head_dim) + mask).softmax(dim=1)
            x = x + weights @ v[:, one] @ a.out.weight[:, one].T
            layers[-1].append(weights.tolist())
        up = block.mlp.up(F.layer_norm(x, [16]))
        act = F.gelu(up) if c.activation == 'gelu' else F.relu(up)
        x = x + block.mlp.down(act**2 if c.activation == 'relu2' else act)
    return model.head(F.layer_norm(x, [16])), layers


@pytest.mark.parametrize('position, activation', [
    ('rotary', 'relu'), ('learned', 'gelu'), ('none', 'relu2')])
def test_a_gpt_is_what_it_is_by_hand(position, activation):
    """With a mask of -inf, and with rotary positions as complex numbers."""
    model = small(position=position, activation=activation)
    idx = torch.tensor([1, 2, 3, 1, 0])
    logits, _ = by_hand(model, idx)
    assert_close(model(idx[None])[0], logits)


def test_a_batch_is_learned_by_heart():
    """From ln V, as if all tokens were alike, to almost nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, block_size=16, n_embd=32))
    optimizer = gpt.Optimizer(model, 0.02)
    x, y = torch.randint(20, (2, 4, 16))

    def loss():
        return F.cross_entropy(model(x).mT, y)

    assert loss().item() == pytest.approx(math.log(20), rel=0.02)
    for t in range(1, 61):
        model.zero_grad()
        loss().backward()
        optimizer.step(t)
    assert loss() < 0.05


# ------------------------------------------------------------------------------ generation

@pytest.mark.parametrize('changes', [{}, dict(position='learned'), dict(n_layer=0),
                                     dict(block_size=1)])
def test_cached_generation_is_recomputation(changes):
    """Token by token, past the block size: full windows start again from their last half."""
    model, start = small(**changes), torch.randint(11, (3, 2))
    T = model.config.block_size
    seen = start[:, -T:]
    for new in gpt.generate(model, start, 50, temperature=0):
        if seen.size(1) > T:
            seen = seen[:, -max(1, T // 2):]
        assert torch.equal(new, model(seen)[:, -1].argmax(-1))
        seen = torch.cat((seen, new[:, None]), 1)


P = torch.tensor([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize('how, right', [
    ({}, P),
    (dict(temperature=0.5), P**2),
    (dict(top_k=2), P * (P > 0.2)),
    (dict(top_p=0.9), P * (P > 0.1)),
    (dict(temperature=0), P > 0.4)])
def test_sampling_follows_the_probabilities(how, right):
    """temperature divides the logits, top_k and top_p keep what they say, equal ones together."""
    torch.manual_seed(0)
    drawn = gpt.next_token(P.log().expand(20_000, 4), **how).flatten()
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert_close(shares, right / right.sum(), atol=0.02, rtol=0)
    assert (shares[right == 0] == 0).all()
    equal = gpt.next_token(torch.zeros(20_000, 4), top_k=1).flatten()
    assert torch.bincount(equal).min() > 4000


# ------------------------------------------------------------------------------ the optimizer

def by_svd(G):
    """U f(f(f(S))) V^T for G = U S V^T of norm 1, where f is the polynomial."""
    U, s, Vh = torch.linalg.svd(G / G.norm(), full_matrices=False)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ Vh


def test_newton_schulz_brings_singular_values_near_1():
    """All but the smallest, in five steps."""
    G = torch.randn(16, 64)
    values = torch.linalg.svdvals(gpt.orthogonalize(G, steps=5))
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize('muon', [True, False])
def test_each_kind_of_parameter_walks_by_its_rule(muon):
    """Matrices by Muon's, with the SVD; tables and all else as torch's AdamW has it, tables at five
    times the rate. Without muon AdamW takes all, at one rate."""
    shape = dict(bias=True, norm_weights=True, position='learned', mlp_dim=40)
    model, twin = small(**shape), small(**shape)
    ours = gpt.Optimizer(model, 0.02, weight_decay=0.3, momentum=0.9, muon=muon)
    matrices = [m.weight for m in twin.blocks.modules() if muon and isinstance(m, nn.Linear)]
    tables = [m.weight for m in twin.modules() if muon and isinstance(m, nn.Embedding)]
    others = set(twin.parameters()).difference(matrices, tables)
    rates = dict(params=tables, lr=0.1), dict(params=[*others], lr=0.02)
    theirs = torch.optim.AdamW(rates, betas=(0.8, 0.99), weight_decay=0.3)
    means = dict.fromkeys(matrices, 0)
    for t in range(1, 11):
        for a, b in zip(model.parameters(), twin.parameters()):
            a.grad = b.grad = torch.randn_like(a)
        ours.step(t)
        theirs.step()
        for w in matrices:
            n, m = w.shape
            means[w] = 0.9 * means[w] + 0.1 * w.grad
            X = by_svd(0.9 * means[w] + 0.1 * w.grad)
            w.data *= 1 - 0.02 * 0.3
            w.data -= 0.02 * math.sqrt(max(1, n / m)) * X
    assert_close([*model.parameters()], [*twin.parameters()], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ the whole way

@pytest.mark.parametrize('kind', gpt.TOKENIZERS)
def test_the_whole_way(run, papers, kind):
    """Papers in, a trained model, text out, in a folder that holds nothing else."""
    run(*PREPARE, f'--tokenizer={kind}')
    result = run('train.py', *TINY, '--max_iters=60', '--eval_interval=30')
    lines = [line for line in result.out.splitlines() if line.startswith('step')]
    assert [line.split()[1] for line in lines] == ['0', '30', '60']
    line = r'step    30  train \d\.\d\d  val \d\.\d\d  \d\.\d\d bits/char  0m0\ds left'
    assert re.fullmatch(line, lines[1])
    assert all(len(line) <= 80 for line in result.out.splitlines() if 'out' not in line)
    assert result.log[-1]['val_loss'] < 0.8 * result.log[0]['val_loss']
    text = run('sample.py', '--max_new_tokens=50', '--start=Let $X', '--num_samples=2').out
    assert text.startswith('Let $X') and text.count('Let $X') >= 2


def test_the_result_is_the_best_weights_on_the_whole_validation_part(run, papers):
    """Token by token; on the screen, in log.csv, in the page and in the checkpoint."""
    run(*PREPARE, '--val_fraction=0.3')
    worse = '--learning_rate=1', '--decay_lr=no'  # as it goes on
    result = run('train.py', *TINY, '--max_iters=40', '--eval_interval=10', *worse)
    model, _, saved = gpt.load('out/ckpt.safetensors')
    step, bits = saved['step'], saved['val_bpc']
    assert step == min(result.log, key=lambda row: row['val_loss'])['step'] < 40
    ids, nats = result.val.long(), 0
    for part in torch.arange(len(ids) - 1).split(16):
        logits = model.eval()(ids[None, part])[0]
        nats += F.cross_entropy(logits, ids[part + 1], reduction='sum').item()
    nats_a_character = nats / (len(ids) - 1) * len(ids) / result.meta['val']['characters']
    assert bits == pytest.approx(nats_a_character / math.log(2), rel=1e-4)
    assert f'best of step {step}, on the whole validation part: {bits:.3f}' in result.out
    rows = [*csv.DictReader(Path('out/log.csv').read_text().splitlines())]
    assert [int(row['step']) for row in rows] == [0, 10, 20, 30, 40, step]
    assert float(rows[-1]['val_bpc']) == bits
    assert numbers('out/run.html')['result'][0]['val_bpc'] == bits


def test_evaluations_are_twenty_and_read_the_same_blocks(run, papers):
    """Evenly spaced ones, at least 2^14 tokens of them where there are as many."""
    (papers / 'a.tex').write_text(corpus(5, 4000))
    run(*PREPARE, '--tokenizer=char', '--val_fraction=0.4')
    result = run('train.py', *TINY, '--max_iters=40', '--eval_interval=0', '--block_size=64')
    assert [row['step'] for row in result.log] == [*range(0, 41, 2)]
    few, every = result.few_blocks, result.every_block
    assert 2**14 <= 64 * len(few) < 64 * len(every)
    assert few == every[::few.step // 64]


def test_a_budget_is_kept_and_the_rate_falls_with_the_time(run, refused, papers):
    """Evaluations take a tenth of it at most; one that's over before a step says so."""
    result = run('train.py', *TINY, '--eval_interval=0', '--max_minutes=0.02', '--warmup_iters=0')
    assert 1.2 <= result.log[-1]['seconds'] < 1.6
    for row in result.log[1:]:
        rate = row['learning_rate'] / result.learning_rate
        assert rate == pytest.approx(max(0, 1 - row['seconds'] / 1.2), abs=0.15)
    assert 'take more' in refused('train.py', *TINY, '--max_minutes=1e-9')


def test_finetuning_goes_on_from_what_was_learned(run, refused, papers):
    """The first loss is a trained model's, whatever the seed; another tokenizer is refused."""
    first = run('train.py', *TINY, '--max_iters=60', '--eval_interval=60', '--out_dir=base')
    base = 'base/ckpt.safetensors'
    write_papers(a=7)
    run('prepare.py', '--source=mine', '--dataset=mine', f'--tokenizer_from={base}')
    how = [argument for argument in TINY if 'block_size' not in argument]
    other = run('train.py', *how, f'--init_from={base}', '--seed=1')
    second = run('train.py', *how, f'--init_from={base}')
    assert second.log[0]['val_loss'] < first.log[0]['val_loss'] - 1
    assert second.log[0]['val_loss'] == other.log[0]['val_loss']
    assert second.log[-1]['val_loss'] != other.log[-1]['val_loss']  # another dropout
    resumed = run('train.py', '--init_from=resume', '--max_iters=9')
    assert resumed.i == 9 and resumed.block_size == resumed.model.config.block_size == 16
    run(*PREPARE, '--vocab_size=290')
    said = refused('train.py', *TINY, f'--init_from={base}')
    assert f'--tokenizer_from={base}' in said


def newest(folder):
    """What is saved with the newest state of a run."""
    model, _, saved = gpt.load(f'{folder}/last.safetensors')
    return dict(saved, weights=model.state_dict())


def same_walk(one, other):
    """The newest states of two runs are the same, bit for bit, but for the seconds."""
    a, b = newest(one), newest(other)
    for part in 'weights', 'state':
        assert_close(a[part], b[part], atol=0, rtol=0)
    for row, its in zip(a['run']['log'], b['run']['log']):
        assert {**row, 'seconds': 0} == {**its, 'seconds': 0}


@pytest.mark.parametrize('kind, extra', [
    ('bpe', []), ('word', ['--dropout=0']), ('char', ['--optimizer=adamw'])])
def test_a_resumed_run_is_the_run_that_never_stopped(run, papers, at_call, kind, extra):
    """Bit for bit: stopped by Ctrl-C in its fourth step, and resumed."""
    run(*PREPARE, f'--tokenizer={kind}')
    run('train.py', *TINY, '--out_dir=whole', *extra)
    at_call(gpt.Optimizer, 'step', [4], interrupt)
    stopped = run('train.py', *TINY, *extra, code=130)
    assert 'python train.py --init_from=resume --out_dir=out' in stopped.out
    for where in 'from step 4', 'from step 6':
        resumed = run('train.py', '--init_from=resume').out
        assert where in resumed and 'finished' in resumed
        same_walk('out', 'whole')


def test_a_resumed_run_has_its_own_settings_to_its_end(run, refused, papers):
    """How long and where may change; what would change its walk is refused by name."""
    run('train.py', *TINY, '--learning_rate=0.03', '--eval_interval=2')
    result = run('train.py', '--init_from=resume', '--max_iters=8')
    assert result.i == 8 and result.learning_rate == 0.03 and result.eval_interval == 2
    for argument in '--learning_rate=0.02', '--batch_size=4', '--seed=1', '--dataset=papers':
        name = argument.split('=')[0]
        assert name in refused('train.py', '--init_from=resume', argument)


def test_nothing_trained_is_overwritten(base, run, refused):
    """A run that is there is moved aside, and the new one's page shows it."""
    before = Path('out/ckpt.safetensors').read_bytes()
    refused('train.py', '--dataset=nowhere')  # not by one that can't begin
    assert 'out.1' in run('train.py', *TINY).out
    assert Path('out.1/ckpt.safetensors').read_bytes() == before
    rows = newest('out.1')['run']['log']
    assert numbers('out/run.html')['aside'] == dict(title='out.1', rows=rows)


# ------------------------------------------------------------------------------ settings

@pytest.mark.parametrize('command, hint', [line.split(' -> ') for line in r'''
    train.py --bach_size=3 -> bach_size
    train.py --batch_size=x -> int
    train.py --batch_size=0 -> [1, 10000]
    train.py --max_iters=1e3 -> int
    train.py --max_iters -> max_iters
    train.py --dropout=nan -> [0, 0.99]
    train.py --learning_rate=-1 -> [0,
    train.py --compile=perhaps -> compile
    train.py --position=left -> rotary
    train.py --seed=-- -> no value
    train.py config.py -> config.py
    train.py --device=abacus -> device
    train.py --device=meta -> device
    train.py --dataset=nowhere -> prepare.py
    train.py --dataset=mine --n_head=7 -> n_head
    train.py --dataset=mine --head_dim=7 -> even
    train.py --dataset=mine --n_embd=0 -> above 0
    train.py --dataset=mine --block_size=65536 -> smaller --block_size
    train.py --dataset=mine --out_dir=file -> out_dir
    train.py --dataset=mine --out_dir=file/x -> out_dir
    train.py --dataset=mine --out_dir= -> out_dir
    prepare.py --source=nowhere -> nowhere
    prepare.py --val_fraction=2 -> [0.001,
    sample.py --temperature=-1 -> [0,
    sample.py --top_p=1.5 -> 1]
    sample.py --out_dir=nowhere -> nowhere
    sample.py --page=p.html -> --text
    sample.py --page=p.tex --text=file -> end in .html
    sample.py --text=nowhere.tex -> nowhere.tex
    sample.py --text=file -> too short
    sample.py --attention=no/where.html -> no/where.html
    sample.py --start=FILE: -> directory
    sample.py --start=FILE:mine -> mine'''.strip().splitlines()])
def test_what_a_user_gets_wrong_ends_with_one_line(refused, base, command, hint):
    Path('file').write_text('x')
    assert hint in refused(*command.split())


def test_what_does_not_fit_into_memory_is_said_in_one_line(run, papers):
    said = spawn('train.py', *TINY, '--n_embd=1024', '--mlp_dim=2000000000', code=2)
    assert said.count('\n') == 1 and '--n_embd' in said


def test_settings_are_taken_and_listed(run, papers):
    run('prepare.py', '--source=mine', '--dataset', 'mine', '--vocab_size', '300')
    result = run('train.py', *TINY, '--bias=yes', '--learning_rate=1', '--tied=0')
    assert result.bias is True and result.learning_rate == 1.0 and result.tied is False
    listed = run('train.py', '--help', '--n_embd=3').out
    assert all(f'--{name}' in listed for name in result.config)
    assert run('sample.py', '--start=a=b', '--max_new_tokens=3').out.startswith('a=b')


@pytest.mark.parametrize('kind', gpt.TOKENIZERS)
def test_every_prompt_is_gone_on_from(run, refused, papers, kind):
    """Empty, longer than the window, of unknown characters, of bytes that are no text."""
    tokenizer = gpt.TOKENIZERS[kind].learn(corpus(1, 50), 300)
    gpt.save('ckpt.safetensors', small(vocab_size=len(tokenizer.tokens)), tokenizer)
    for start in '', 'x' * 999, '\u0416', 'FILE:data/mine/train.bin', 'FILE:/dev/null', '\udcff':
        assert run('sample.py', '--out_dir=.', '--max_new_tokens=20', f'--start={start}').out
    assert 'nwhere' in refused('sample.py', '--out_dir=.', '--start=FILE:no\nwhere')
    run('prepare.py', '--source=mine', '--dataset=\udcff')  # a name of such bytes


def test_the_docstrings_examples():
    assert doctest.testmod(gpt).failed == 0


def paper(name):
    return (HERE / f'papers/{name}.tex').read_text('utf-8')


def test_the_programs_names_in_the_papers_stand_in_it():
    """Each \\code{...} with an underscore, a dot or a capital in it."""
    known = [path.name for path in [*HERE.glob('*'), *HERE.glob('[!.]*/*')]]
    known += [path.read_text('utf-8') for path in HERE.glob('*.py') if path.name != 'test_gpt.py']
    known = '\n'.join(known)
    for path in HERE.glob('papers/*.tex'):
        for name in re.findall(r'\\code\{([^{}]*[_.A-Z][^{}]*)\}', paper(path.stem)):
            assert name.replace('\\', '') in known, path


def test_numbers_in_the_papers_are_the_programs():
    """Parameters of the original and of the default, and a singular value after three steps."""
    for config in GPTConfig(**ORIGINAL), GPTConfig(2048, n_layer=3, n_embd=96):
        assert f'{config.n_params:,}' in paper('scaling').replace('{,}', ',')
    G = torch.tensor([[3., 0.], [4., 5.]])
    values = torch.linalg.svdvals(gpt.orthogonalize(G))
    assert f'${values[0]:.4f}$' in paper('muon')


# ------------------------------------------------------------------------------ seeing it think

def numbers(path):
    """What a page shows."""
    page = Path(path).read_text(encoding='utf-8')
    assert not re.search(r'http(?!://www.w3.org/)|src=|@import|url\(', page)  # nothing elsewhere
    text = page.split('const data = ')[1]
    data, length = json.JSONDecoder().raw_decode(text)
    assert '<' not in text[:length]
    return data


def checkpoint(learned='abcdefghi\n' + gpt.UNKNOWN, **changes):
    """A model with weights that say something and a char tokenizer, in out."""
    tokenizer, model = CharTokenizer(list(learned)), small(vocab_size=len(learned), **changes)
    os.makedirs('out', exist_ok=True)
    gpt.save('out/ckpt.safetensors', model, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize('shape', [dict(position='rotary'), dict(position='learned'),
                                   dict(n_layer=0)])
def test_the_attention_page_shows_the_models_own_numbers(run, shape):
    """Weights and probabilities as by hand. The bigram model has a page without attention."""
    model, tokenizer = checkpoint(**shape)
    run('sample.py', '--start=abacad', '--attention=a.html')
    page, ids = numbers('a.html'), tokenizer.encode('abacad')
    logits, layers = by_hand(model, torch.tensor(ids))
    p = logits.softmax(-1)
    assert page['ids'] == ids
    assert_close(torch.tensor(page['layers']), torch.tensor(layers), atol=6e-5, rtol=0)
    likely = torch.stack(p.topk(5), dim=-1)  # (T, 5, 2)
    assert_close(torch.tensor(page['likely']), likely.float(), atol=1e-4, rtol=0)
    surprise = -p[range(5), ids[1:]].log2()
    assert_close(torch.tensor(page['bits'][1:]), surprise, atol=0.01, rtol=0)


@pytest.mark.parametrize('block_size', [1, 2, 5, 16])
def test_the_score_of_a_text(run, block_size):
    """Bits per character, token by token: each given all of the window that it is scored in."""
    model, tokenizer = checkpoint(block_size=block_size)
    new = (block_size + 1) // 2
    for length in 2, 5, 16, 17, 41:
        text = ('abcade\nfzghi' * 9)[:length]
        Path('text.tex').write_text(text)
        result = run('sample.py', '--text=text.tex', '--page=t.html')
        ids, bits = torch.tensor(tokenizer.encode(text)), [0]
        for t in range(1, length):  # place t - 1 is one of those that end at `end`
            end = (t - 1) // new * new + new
            seen = ids[max(0, end - block_size):t]
            nats = F.cross_entropy(model(seen[None])[0, -1], ids[t])
            bits.append(nats.item() / math.log(2))
        assert f'{sum(bits) / (length - 1):.3f} bits per character' in result.out
        assert numbers('t.html')['bits'] == pytest.approx(bits, abs=0.006)


def test_hostile_tokens_stay_text(run):
    """Whatever a token is, the page has one script and no tag of the text's."""
    nasty = ['</script>', '<!--', '<b>', '&amp;', '"', '\\', '\n', '\u2028', ' ', 'a', gpt.UNKNOWN]
    checkpoint(nasty)
    Path('<i>.tex').write_text('a a\n' * 9)
    run('sample.py', '--start=a a\n a', '--attention=a.html')
    run('sample.py', '--text=<i>.tex', '--page=t.html')
    for path in 'a.html', 't.html':
        assert numbers(path)['tokens'] == nasty
        page = Path(path).read_text(encoding='utf-8')
        assert page.count('</script>') == 1
        assert not any(tag in page for tag in ('<!--', '<i>', '<b>', '\u2028'))
    bpe = BPETokenizer([])  # of which most tokens are a part of a character
    gpt.save('out/ckpt.safetensors', small(vocab_size=256), bpe)
    run('sample.py', '--start=\u00e9', '--attention=a.html')
    assert [numbers('a.html')['tokens'][i] for i in bpe.encode('\u00e9')] == ['\\xc3', '\\xa9']


def test_without_its_page_a_run_goes_on_and_says_so_once(run, refused, papers, monkeypatch):
    monkeypatch.setattr(gpt, 'PAGE', Path('nowhere/page.html'))
    result = run('train.py', *TINY)
    assert result.out.count('nowhere/page.html') == 1 and not os.path.exists('out/run.html')
    assert 'nowhere/page.html' in refused('sample.py', '--attention=a.html')


def proof_reader(text):
    """A model that has learned by heart which character follows which, in out."""
    learned = sorted({*text, *'%', gpt.UNKNOWN})
    tokenizer = gpt.CharTokenizer(learned)
    model = small(vocab_size=len(learned), n_layer=0, n_head=1, n_embd=len(learned))
    gpt.learn_pairs(model, torch.tensor(tokenizer.encode(text)), 60)
    os.makedirs('out', exist_ok=True)
    gpt.save('out/ckpt.safetensors', model, tokenizer)


SENTENCE = 'Every compact surface $X$ has a \\textbf{triangulation} and an open covering\n\n'
SLIPS = {'compact': 'comapct', 'surface': 'surfce', 'Every': 'Everry', 'open': 'opfn',
         '\\textbf': '\\tetxbf'}


@pytest.mark.parametrize('word', SLIPS)
def test_a_misspelt_word_is_found_and_what_was_expected(run, tmp_path, word):
    """First of all words, with its line in the file as it stands; whatever kind of slip it is."""
    proof_reader(SENTENCE * 20)
    hidden = '% a commment\n\\documentclass{atricle}\n\\begin{document}\n'
    slip = SENTENCE.replace(word, SLIPS[word])
    (tmp_path / 'a.tex').write_text(
        hidden + SENTENCE * 3 + slip + SENTENCE * 3 + 'Open\n\\end{document}\nbehidn\n')
    out = run('sample.py', '--text=a.tex', '--page=a.html').out.splitlines()
    found = [line for line in out if line.startswith('line ')]
    assert found[0].startswith(f'line 10: {SLIPS[word]}, ')
    assert found[0].endswith(f'; expected {word}')
    page = numbers('a.html')
    first, text = page['words'][0], ''.join(page['tokens'][i] for i in page['ids'])
    assert text[first['at']:].startswith(SLIPS[word]) and first['line'] == 10
    length = len(SLIPS[word])
    bits = page['bits'][first['at']:first['at'] + length]
    assert first['bits'] == pytest.approx(sum(bits), abs=0.01 * length)
    (_, begin), (end, _) = page['quiet'][-2:]
    assert text[:begin] == hidden.rstrip('\n') and text[end:] == '\\end{document}\nbehidn\n'
    ranked = {slip['word'] for slip in page['words']}
    assert not ranked & {'commment', 'atricle', 'behidn', 'compact', 'Open'}


@pytest.mark.parametrize('sign, left', ['}{', '$$'])
def test_a_missing_brace_or_dollar_is_found(run, tmp_path, sign, left):
    """By the line of the sign that is left; whole text, with escaped signs in it, has none."""
    proof_reader(SENTENCE * 20)
    whole = SENTENCE + '\\$ 5 \\} \\\\% } $\n$\\text{if $a$ is even}$\n\n'
    (tmp_path / 'whole.tex').write_text(whole * 2)
    (tmp_path / 'a.tex').write_text(whole + SENTENCE.replace(sign, '', 1) + whole)
    assert 'partner' not in run('sample.py', '--text=whole.tex').out
    out = run('sample.py', '--text=a.tex').out.splitlines()
    assert [line for line in out if 'partner' in line] == [f'line 6: {left} without a partner']


# ------------------------------------------------------------------------------ the dream

FATAL = {
    'nothing': '',
    'a backslash': '\\',
    'braces': '{' * 10_000,
    'closing braces': '$' + '}' * 5000,
    'dollars': '$' * 999,
    'scripts': '$' + '^^5c' * 200 + "x'^2'_3_4''" * 100,
    'fences': '$' + '\\left(' * 99 + '\\right' * 99 + '\\left\\right]',
    'lists': '\\begin{itemize}\\item ' * 50 + '\\item[' * 50,
    'a list without an item': '\\begin{enumerate} a \\end{enumerate}\n\\item',
    'blocks': ''.join(f'\\begin{{{name}}}\n' for name in ['proof', 'foo', 'def', 'end'] * 30),
    'cells': '\\begin{align}' + '&' * 300 + '\\\\[x]' * 300 + '\\begin{cases}a&b&c&d',
    'displays in displays': '\\[\\begin{align*}\\begin{equation}\\[ x $$ y $$',
    'missing arguments': '\\frac \\frac{ \\hat} $\\sqrt[3] \\mathbb \\binom1',
    'blank lines': '\\section{a $b \\emph{c\n\n\\frac{d\n \n} \\[ e \\par f',
    'the end': 'a \\end{document} never',
    'verbatim': '\\verb|{| \\begin{verbatim} $ \\end{verbatim} \\lstinline{$}',
    'definitions': '\\def\\x{\\x}\\x \\newcommand{\\y}{\\y} \\let\\z= \\renewcommand{\\end}{}',
    'files': '\\input{x} \\include{y} \\usepackage{z} \\openout1=w \\write18{ls} \\read',
    'primitives': '\\csname \\catcode`\\%=12 \\halign{#\\cr} \\hskip \\if \\noalign \\over \\char',
    'primitives in a formula': '$\\hbox{ \\atop \\mathchar \\kern \\eqno \\limits \\errorstopmode',
    'characters': 'é $é$ \0\x07\ufeff\u2028 𝔸 ％ ＼ 日本 % # & ~ _ ^ \\# \\^o $\\\'e$',
    'a table': '\\begin{tabular}{c|c} a & b \\\\ \\hline \\end{tabular} $\\begin{array}{cc}1&2',
    'references': '\\label{a_b}\\label{a_b} \\ref{a_b} \\cite[x]{%} \\bibitem{} \\footnote{$}',
    'long': '$' + '\\alpha' * 20_000 + 'x' * 200_000,
}


def check_balance(body):
    """What is opened is closed, in order; $ is closed within its paragraph."""
    opened = []
    for token, command, name in re.findall(r'(\\(begin|end)\{(.*?)\}|\\.|[{}$]|\n\n)', body):
        if command == 'begin' or token == '{':
            opened.append(name or '}')
        elif command == 'end' or token == '}':
            assert opened.pop() == (name or '}')
        elif token == '$' and '$' in opened[-1:]:
            opened.pop()
        elif token == '$':
            opened.append('$')
        elif token == '\n\n':
            assert not {'$', '}'} & set(opened)
    assert not opened


@pytest.mark.parametrize('what', FATAL)
def test_a_dream_compiles(base, run, what):
    """It is balanced, nothing in it is TeX's but what is known to be harmless; TeX agrees."""
    names = run('sample.py', '--max_new_tokens=1', '--tex=dream.tex')
    document = names.document(FATAL[what] + '\n\n\\section*{B}\n\nThe second text is whole.')
    body = document.split('\\maketitle')[1].replace('\\end{document}', '')
    check_balance(body)
    known = '|'.join([names.SIGNS, names.OVER, names.FRACTIONS, names.TEXT, names.KEPT])
    for word in re.findall(r'\\([A-Za-z]+)', body):
        assert re.fullmatch(known, word)
    assert set(body) <= {*map(chr, range(32, 127)), '\t', '\n', *names.LETTERS}
    assert not re.search(r'(?<!\\)[#%]|\^\^', body)
    assert max(map(len, body.splitlines())) < 200_000  # what TeX reads as a line
    assert body.rstrip().endswith('The second text is whole.')
    if shutil.which('pdflatex'):
        with open('fatal.tex', 'w', encoding='utf-8') as file:
            file.write(document)
        subprocess.run(['pdflatex', '-interaction=nonstopmode', 'fatal.tex'],
                       stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        assert os.path.exists('fatal.pdf')


def test_a_dream_is_what_was_written(base, run):
    """What was well written stays; an unknown word shows its name; the screen has it raw."""
    names = run('sample.py', '--max_new_tokens=9', '--tex=dream.tex', '--start=$\\foo_1')
    assert '$\\foo_1' in names.out and 'pdflatex' in names.out and 'Overleaf' in names.out
    names.saved['macros'] = ['\\newcommand{\\R}{\\mathbb{R}}', '\\newcommand{\\m}[2]{#2_{#1}}']
    for text, there in [('\\section{A} Let $x^{2}$ be \\emph{odd}.', None), ("don't", None),
                        ('$\\frac12 x_1$', '$ \\frac{1}{2} x_{1}$'), ('\\alpha', '$ \\alpha$'),
                        ('$\\m{a}{b}\\in\\R$', '$ {b}_{{a}}\\in\\mathbb{R}$'),
                        ('\\x a', '\\textsf{x} a'),
                        ('\\[a & b\\\\ c', '\\begin{aligned}{}a & b\\\\{} c\\end{aligned}'),
                        ('\\begin{lemma}[A] b', '\\begin{called}{lemma}[A]{} b\\end{called}')]:
        assert (there or text.replace('$x', '$ x')) in names.document(text)


def test_several_texts_are_sections(base, run, refused):
    run('sample.py', '--max_new_tokens=1', '--num_samples=3', '--tex=dream.tex', '--start=So')
    with open('dream.tex') as file:
        assert file.read().count('\\section*{Another dream}') == 2
    for bad in (['--tex=x.pdf'], ['--tex=no/where.tex'], ['--tex=x.tex', '--text=dream.tex']):
        assert 'tex' in refused('sample.py', '--max_new_tokens=1', *bad)


# ------------------------------------------------------------------------------ nothing lost

def test_a_full_disk_leaves_the_old_data_set_whole(run, refused, papers, at_call):
    before = held('data/mine')
    at_call(os, 'fsync', [2], disk_full)
    write_papers(a=9)
    refused(*PREPARE)
    assert held('data/mine') == before
    run(*PREPARE)  # which finds what the first has left
    assert held('data/mine') != before and os.listdir('data') == ['mine']


def test_a_folder_that_vanished_is_made_again(run, papers, at_call):
    at_call(gpt.Optimizer, 'step', [4], lambda *_: shutil.rmtree('out'))
    run('train.py', *TINY)
    assert newest('out')['run']['i'] == 6


@pytest.mark.parametrize('stop, interval', [(False, 1), (False, 6), (True, 6)])
def test_a_loss_that_is_no_number_is_not_saved(refused, papers, at_call, stop, interval):
    """At an evaluation, at a step, and where Ctrl-C comes in the step that broke the weights."""
    def poison(optimizer, *_):
        optimizer.model.token.weight.data.fill_(math.nan)
        if stop:
            interrupt()

    at_call(gpt.Optimizer, 'step', [3], poison)
    said = refused('train.py', *TINY, f'--eval_interval={interval}')
    assert 'number' in said and '--learning_rate' in said
    for name in 'ckpt', 'last':
        gpt.load(f'out/{name}.safetensors')  # which refuses what is not finite


def test_a_second_run_in_the_same_folder_stops(base, run, refused):
    """The lock is the system's: it goes with the process, however that ends."""
    before = Path('out/last.safetensors').read_bytes()
    long = '--init_from=resume', '--max_iters=1000000', '--eval_interval=1000000'
    other = subprocess.Popen([sys.executable, HERE / 'train.py', *long], stdout=subprocess.PIPE)
    other.stdout.readline()  # it is at work
    try:
        for how in TINY, long:
            assert 'at work' in refused('train.py', *how)
    finally:
        other.kill()
        other.communicate()
    assert Path('out/last.safetensors').read_bytes() == before
    run('train.py', *TINY)


@pytest.mark.parametrize('name, act, code', [
    ('replace', lambda *_: sys.exit(9), 9), ('fsync', disk_full, 2)])
@pytest.mark.parametrize('call', [5, 6, 7, 8])
def test_cut_short_in_saving_a_resumed_run_ends_the_same(base, run, at_call, name, act, code, call):
    """Killed, or with a full disk, at one of the four files of the second evaluation."""
    at_call(os, name, [call], act)
    run('train.py', *TINY, '--out_dir=cut', code=code)
    run('train.py', '--init_from=resume', '--out_dir=cut')
    same_walk('cut', 'out')
    assert Path('cut/log.csv').read_text().count('\n') == 5  # a heading, three rows, the result


# ------------------------------------------------------------------------------ checkpoints

def test_a_checkpoint_is_a_safetensors_file(run):
    """Read by the lines in save's docstring, with json and struct alone; a tied table stands there
    once. And load reads it."""
    (model, tokenizer), state = checkpoint(tied=True), {'mean.x': torch.ones(2, 5)}
    gpt.save('out/ckpt.safetensors', model, tokenizer, state, step=3)
    tensors = dict(model.named_parameters(), **state)
    _, code = gpt.save.__doc__.split('by hand:')
    for name, w in tensors.items():
        read = dict(json=json, struct=struct)
        exec(textwrap.dedent(code).replace('token.weight', name), read)
        header, numbers = read['header'], torch.tensor(read['numbers'])
        assert torch.equal(numbers.view(w.shape), w)
        assert header[name]['dtype'] == 'F32' and header[name]['shape'] == [*w.shape]
    assert header['__metadata__']['step'] == '3' and len(header) == len(tensors) + 1
    again, _, _ = gpt.load('out/ckpt.safetensors')
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(idx), model(idx))


def change(data, row):
    """Change one thing in what was saved: config/n_layer=3"""
    path, value = row.split('=', 1)
    *keys, last = path.split('/')
    for key in keys:
        data = data[key]
    data[last] = json.loads(value)


def spoil(row):
    """Change one thing in both checkpoints of out."""
    for path in 'out/last.safetensors', 'out/ckpt.safetensors':
        model, tokenizer, saved = gpt.load(path)
        saved.update(config=vars(model.config), tokenizer=vars(tokenizer))
        change(saved, row)
        del saved['tokenizer']  # which is saved again from the object
        gpt.save(path, model, tokenizer, **saved)


DOUBLING = [[97, 97]] + [[256 + i, 256 + i] for i in range(43)]  # a token of 2^44 bytes


@pytest.mark.parametrize('row', [
    'config/n_layer=1000000000', 'config/n_embd=-16', 'config/n_embd=1000000000',
    'config/block_size="x"', 'config/colour=1', 'config/n_layer=0',
    'config/n_embd=8', 'config/mlp_dim=32', 'tokenizer/kind="no"', 'tokenizer/learned=[[97, 98]]',
    'tokenizer/learned="x"', f'tokenizer/learned={DOUBLING}'])
def test_a_hostile_checkpoint_is_refused_by_every_script(base, refused, row):
    spoil(row)
    for command in (
            'sample.py',
            'train.py --init_from=resume',
            'train.py --init_from=out/ckpt.safetensors --dataset=mine --out_dir=new',
            'prepare.py --tokenizer_from=out/ckpt.safetensors --source=mine'):
        assert 'no checkpoint' in refused(*command.split())


def test_a_state_that_lacks_something_is_not_resumed(base, refused):
    spoil('state={}')
    assert 'resumed' in refused('train.py', '--init_from=resume', '--max_iters=9')


NO_JSON = b'', b'[]', b'{', b'[' * 200_000, bytes(range(256))


def test_a_damaged_checkpoint_is_refused(base, refused):
    """Too short, too long, numbers that are none or not where they should be, no header."""
    path = Path('out/ckpt.safetensors')
    data = path.read_bytes()
    short = data[:-4]
    for damaged in (
            short, short + struct.pack('<f', math.nan), short + struct.pack('<f', math.inf),
            data.replace(b'[0, ', b'[4, '),
            data.replace(b'[300, 16]', b'[16, 300]'),
            *NO_JSON, *(struct.pack('<Q', len(header)) + header for header in NO_JSON)):
        path.write_bytes(damaged)
        assert 'no checkpoint' in refused('sample.py')


@pytest.mark.parametrize('row', [
    'tokenizer="x"', 'tokenizer/kind="no"', f'tokenizer/learned={DOUBLING}', 'val=[]', 'train={}',
    'tokenizer={"kind": "char", "learned": ["a", "a"]}'])
def test_a_meta_json_that_is_damaged_is_refused(papers, refused, row):
    path = Path('data/mine/meta.json')
    meta = json.loads(path.read_text())
    change(meta, row)
    path.write_text(json.dumps(meta))
    assert 'prepare.py' in refused('train.py', *TINY)


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json'])
def test_a_data_set_that_is_not_whole_is_refused(papers, refused, name):
    """A file of it is too short, or gone."""
    path = Path('data/mine', name)
    for damage in path.unlink, lambda: path.write_bytes(99 * b'x'):
        damage()
        assert 'prepare.py' in refused('train.py', *TINY)


# ------------------------------------------------------------------------------ more than one

TORCHRUN = '-m', 'torch.distributed.run', '--nproc_per_node=2'


def test_two_processes_walk_the_path_of_one(run, papers):
    """torchrun with two ranks: the same losses up to rounding, one set of files, exit code 0."""
    how = *TINY, '--dropout=0', '--threads=1'
    one = run('train.py', *how)
    out = spawn('train.py', *how, '--out_dir=two', launcher=TORCHRUN)
    assert out.count('parameters') == 1  # one of them speaks
    for a, b in zip(one.log, newest('two')['run']['log']):
        assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-4)
    assert 'finished' in run('train.py', '--init_from=resume', '--out_dir=two').out


# ------------------------------------------------------------------------------ the torture

def torture_kill(n=100):
    """Killed at n moments, saving among them, every run ends bit for bit as if never stopped."""
    write_papers(a=1, b=2)
    spawn(*PREPARE)
    chance, kills, last = random.Random(0), 0, 'out/last.safetensors'
    settings = *TINY, '--max_iters=300', '--eval_interval=1', '--threads=1'
    began = time.time()
    spawn('train.py', *settings, '--out_dir=whole')
    most = time.time() - began
    while kills < n or os.path.exists('out'):
        how = ['--init_from=resume'] if os.path.exists(last) else settings
        try:
            spawn('train.py', *how, timeout=chance.uniform(0.2, 0.5) * most)
            same_walk('out', 'whole')
            shutil.rmtree('out')
        except subprocess.TimeoutExpired:
            kills += 1
            for path in glob.glob('out/*.safetensors'):
                gpt.load(path)
    print(f'{kills} kills, and every run ended as if never stopped')


if __name__ == '__main__' and '--torture' in sys.argv:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torture_kill()
