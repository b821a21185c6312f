"""
Papers in, tokens out: reads LaTeX, cleans it, learns a tokenizer, writes what train.py reads.

    python prepare.py                                    the papers of papers/
    python prepare.py --source=FOLDER --dataset=NAME     your own: .tex, .zip, .tar.gz, arXiv's .gz
"""
import codecs, contextlib, gzip, io, json, math, os, re, sys, tarfile, tempfile, zipfile, zlib
from array import array

from gpt import MAX_VOCAB, TOKENIZERS, UNKNOWN, fail, load, override, quiet, write
import torch
from arxiv_latex_cleaner.arxiv_latex_cleaner import run_arxiv_cleaner

# -------------------------------------------------------------------------------------------------
source = 'papers'  # a file, a folder with all that is in it, or an archive
dataset = 'papers'  # the name of the data set
data_dir = 'data'  # the folder of data sets
tokenizer = 'bpe'  # bpe, word or char
vocab_size = 2048  # the most tokens that are learned
val_fraction = 0.1  # the share of the characters, the last ones, that is kept for validation
tokenizer_from = ''  # a checkpoint whose tokenizer is taken instead, for finetuning it
# -------------------------------------------------------------------------------------------------
config = override(globals(), tokenizer=[*TOKENIZERS], vocab_size=(257, MAX_VOCAB),
                  val_fraction=(0.001, 0.9))
quiet()

MEMBER, WHOLE = 2**26, 2**30  # the most bytes that a file, and all of an archive, may unpack to
ARCHIVE = r'\.(zip|tar|t?gz)$'
sources = []  # what became of each file
scratch = tempfile.TemporaryDirectory()  # where the cleaner works


def show(name):
    """A file's name on one line, whatever is in it."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def note(path, status, before=0, after=0, why=''):
    sources.append(dict(path=show(path), status=status, characters_before=before,
                        characters_after=after, why=why))
    if sys.stdout.isatty():
        print(f'{len(sources)} files', end='\r', flush=True)


# ------------------------------------------------------------------------------------- finding it

def is_latex(name):
    return name.lower().endswith(('.tex', '.ltx', '.latex'))


def files(top):
    """The paths of all files in a folder and its folders, sorted. Links are not followed."""
    found, folders = [], [top]
    while folders:
        folder = folders.pop()
        try:
            for entry in os.scandir(folder):
                if entry.is_symlink():
                    if is_latex(entry.name):
                        note(entry.path, 'skipped', why='a link: name what it leads to as --source')
                elif entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
        except OSError as error:
            note(folder, 'skipped', why=error.strerror)
    return sorted(found)


class Capped:
    """A file that fails rather than give more than WHOLE bytes."""

    def __init__(self, file):
        self.file, self.left = file, WHOLE

    def read(self, size):
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f'unpacks to more than {WHOLE >> 20} MB')
        return data


def unpack(path, file, depth=0):
    """Yield (path, bytes) of the LaTeX in an open file: of itself or, by its first bytes and not
    by its name, of what a zip, a tar or a gzip holds. Nothing is written."""
    head = file.read(512)
    file.seek(0)
    try:
        if depth > 3:
            raise ValueError('archives within archives within archives')
        if head[:2] == b'\x1f\x8b':
            members = ungzip(path, gzip.GzipFile(fileobj=file))
        elif head[:4] == b'PK\x03\x04':
            members = unzip(path, file)
        elif is_tar(head):
            members = untar(path, file)
        elif is_latex(path) or depth and re.search(rb'\\(document|begin|input|def)', head):
            data = file.read(MEMBER + 1)
            if len(data) > MEMBER:
                raise ValueError(f'larger than {MEMBER >> 20} MB')
            yield path, data
            return
        elif re.search(ARCHIVE, path, re.I):
            raise ValueError('not an archive')
        else:
            return
        for name, data in sorted(members):
            if len(data) > MEMBER:
                note(name, 'skipped', why=f'larger than {MEMBER >> 20} MB')
            else:
                yield from unpack(name, io.BytesIO(data), depth + 1)
    except Exception as error:  # whatever a damaged file may cause
        note(path, 'skipped', why=str(error) or type(error).__name__)


def is_tar(head):
    """Whether the first 512 bytes are the header of a tar: its check sum says so."""
    with contextlib.suppress(tarfile.HeaderError):
        return bool(tarfile.TarInfo.frombuf(head, 'utf-8', 'surrogateescape'))


def ungzip(path, file):
    if is_tar(file.read(512)):
        file.seek(0)
        return untar(path, file)
    file.seek(0)
    return [(re.sub(r'\.gz$', '', path), file.read(MEMBER + 1))]


def untar(path, file):
    with tarfile.open(fileobj=Capped(file), mode='r|') as archive:
        return [(f'{path}/{member.name}', archive.extractfile(member).read(MEMBER + 1))
                for member in archive if member.isfile() and wanted(member.name)]


def unzip(path, file):
    members, left = [], WHOLE
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                note(f'{path}/{member.filename}', 'skipped', why='encrypted')
            elif wanted(member.filename) and not member.is_dir():
                with archive.open(member) as inside:
                    members.append((f'{path}/{member.filename}', inside.read(MEMBER + 1)))
                left -= len(members[-1][1])
                if left < 0:
                    raise ValueError(f'unpacks to more than {WHOLE >> 20} MB')
    return members


def wanted(name):
    """LaTeX, an archive, or what arXiv hands out: a name without an ending, or a number."""
    base = name.split('/')[-1]
    return is_latex(base) or bool(re.search(ARCHIVE, base, re.I)
                                  or re.fullmatch(r'[^.]*|[\d.]+(v\d+)?', base))


def documents():
    """Yield (path, bytes) of every LaTeX file of the source."""
    for path in files(source) if os.path.isdir(source) else [source]:
        if wanted(os.path.basename(path)) or path == source:
            left = WHOLE
            try:
                with open(path, 'rb') as file:
                    for name, data in unpack(path, file):
                        left -= len(data)
                        if left < 0:
                            raise OSError(0, f'unpacks to more than {WHOLE >> 20} MB')
                        yield name, data
            except OSError as error:
                note(path, 'skipped', why=error.strerror)


# ------------------------------------------------------------------------------------- reading it

def decode(data):
    """Bytes to text: by its mark, as UTF-8, as its inputenc says, as latin-1."""
    for mark, codec in ((codecs.BOM_UTF8, 'utf-8-sig'), (codecs.BOM_UTF16_LE, 'utf-16'),
                        (codecs.BOM_UTF16_BE, 'utf-16')):
        if data.startswith(mark):
            return data.decode(codec, 'replace')
    declared = re.search(rb'\[((?:latin|ansi|apple|mac|cp|koi|iso)[\w-]*)\]\s*\{inputenc\}', data)
    declared = declared.group(1).decode() if declared else 'latin-1'
    codec = {'ansinew': 'cp1252', 'applemac': 'mac-roman'}.get(declared, declared)
    for codec, errors in (('utf-8', 'strict'), (codec, 'replace'), ('latin-1', 'replace')):
        with contextlib.suppress(UnicodeError, LookupError):
            return data.decode(codec, errors)


def clean(text):
    """Take out comments and what never prints: (text, why the cleaner couldn't, if it couldn't).

    The cleaner drops what follows \\end{document}, so a file of several papers goes through it
    paper by paper.
    """
    text = re.sub(r'\n[ \t]*\n\s*\n', '\n\n', text)  # the cleaner takes its time for each line
    ends = [match.end() for match in re.finditer(r'\\end\{document\}.*\n?', text)]
    out, why = [], ''
    for start, end in zip([0, *ends], [*ends, len(text)]):
        if text[start:end].strip():
            try:
                out.append(run_cleaner(text[start:end]))
            except Exception as error:
                out.append(re.sub(r'(?<!\\)((?:\\\\)*)%.*', r'\1%', text[start:end]))
                why = f'arxiv-latex-cleaner: {type(error).__name__}; comments stripped simply'
    text = ''.join(out)
    # A % that is left at the end of a line takes the line end and the next indentation with it,
    # as in TeX; before a blank line, the paragraph's end stays.
    text = re.sub(r'(?<!\\)((?:\\\\)*)%[ \t]*\n(?:[ \t]*(\n)|[ \t]*)', r'\1\2\2', text)
    return re.sub(r'\n[ \t]*\n\s*\n', '\n\n', text), why


def run_cleaner(text):
    """The cleaner's public function, on one file in a folder by itself."""
    folder = os.path.join(scratch.name, 'in')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'paper.tex'), 'w', encoding='utf-8') as file:
        file.write(text)
    with contextlib.redirect_stderr(io.StringIO()):
        run_arxiv_cleaner(dict(
            input_folder=folder, keep_bib=False, commands_to_delete=[], images_allowlist={},
            im_size=500, pdf_im_resolution=500, resize_images=False, compress_pdf=False))
    with open(os.path.join(scratch.name, 'in_arXiv', 'paper.tex'), encoding='utf-8') as file:
        return file.read()


def without_repeats(text, seen):
    """Drop each paragraph of 100 characters or more that has been seen before."""
    kept = []
    for paragraph in text.split('\n\n'):
        if len(paragraph) < 100 or paragraph not in seen:
            kept.append(paragraph)
            seen.add(paragraph)
    return '\n\n'.join(kept)


def yardsticks(train, val, V, characters):
    """Bits per character of the validation part under three models that were counted on the
    training part, one being added to each count: p(b) = (n_b + 1) / (N + V), p(b | a) =
    (n_ab + 1) / (n_a + V), and 1 / V."""
    def pairs(ids):
        return ids[:-1] * V + ids[1:]
    val = torch.frombuffer(val, dtype=torch.int16).long() & 0xffff
    kinds, which = pairs(val).unique(return_inverse=True)
    n, n_pairs = torch.zeros(V).double(), torch.zeros(len(kinds)).double()
    for start in range(0, len(train), 2**20):  # so that little of it is in memory as int64
        part = torch.frombuffer(train[start:start + 2**20 + 1], dtype=torch.int16).long() & 0xffff
        n += part[:2**20].bincount(minlength=V)
        part = pairs(part)
        at = torch.searchsorted(kinds, part).clamp(max=len(kinds) - 1)
        n_pairs += at[kinds[at] == part].bincount(minlength=len(kinds))
    unigram = (n[val] + 1) / (len(train) + V)
    n[train[-1]] -= 1  # nothing follows it
    bigram = (n_pairs[which] + 1) / (n[val[:-1]] + V)
    bits = len(val) / characters  # tokens a character
    return {'uniform': bits * math.log2(V), 'unigram': -bits * unigram.log2().mean().item(),
            'bigram': -bits * bigram.log2().mean().item()}


# -------------------------------------------------------------------------------------- the script

if not os.path.isfile(source) and not os.path.isdir(source):
    fail(f'--source={show(source)}: there is no such file or folder')
texts, seen = [], set()
for path, data in documents():
    if b'\0' in data and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        note(path, 'skipped', why='not a text')
        continue
    text = re.sub('\r\n?', '\n', decode(data))
    cleaned, why = clean(text)
    cleaned = without_repeats(cleaned, seen)
    if cleaned.strip():
        texts.append(cleaned)
        note(path, 'stripped' if why else 'cleaned', len(text), len(cleaned), why)
    else:
        note(path, 'skipped', len(text), why='nothing is left of it')
text, n_files = '\n'.join(texts), len(texts)
if not text:
    why = f' ({sources[0]["path"]}: {sources[0]["why"]})' if sources else ''
    fail(f'--source={show(source)}: no LaTeX found{why}')
cut = int(len(text) * (1 - val_fraction))  # as the original did
del texts, seen, data, cleaned  # each as large as the corpus

print(f'learning tokens from {cut:,} characters ...', flush=True)
if tokenizer_from:
    _, tokens, _ = load(tokenizer_from)
else:
    size = MAX_VOCAB if tokenizer == 'char' else vocab_size
    tokens = TOKENIZERS[tokenizer].learn(text[:cut], size)
V = len(tokens.tokens)
meta = dict(tokenizer=dict(kind=tokens.kind, learned=tokens.learned), vocab_size=V)
ids = {}
for name, begin, end in ('train', 0, cut), ('val', cut, len(text)):
    ids[name], size = array('H'), 0
    for start in range(begin, end, 2**16):  # which is where `pieces` cuts as well
        part = text[start:min(start + 2**16, end)]
        ids[name].extend(tokens.encode(part))
        size += len(part.encode('utf-8', 'replace'))
        if sys.stdout.isatty():
            print(f'encoding {start / len(text):4.0%}', end='\r', flush=True)
    meta[name] = dict(characters=end - begin, bytes=size, tokens=len(ids[name]),
                      crc32=zlib.crc32(ids[name]))
    if len(ids[name]) < 3:
        fail(f'the {name} part has {len(ids[name])} tokens of {len(text)} characters in all; '
             'more papers are needed, or another --val_fraction')
meta['yardsticks'] = yardsticks(ids['train'], ids['val'], V, len(text) - cut)
meta['sources'] = sources

folder = os.path.join(data_dir, dataset)
try:
    os.makedirs(folder, exist_ok=True)
    files = {'train.bin': ids['train'], 'val.bin': ids['val'],
             'meta.json': json.dumps(meta).encode()}
    for name, data in files.items():
        write(os.path.join(folder, name), data)
except OSError as error:
    fail(f'{show(error.filename or folder)}: {error.strerror}; --data_dir=FOLDER writes elsewhere')

count = {status: [row for row in sources if row['status'] == status]
         for status in ('cleaned', 'stripped', 'skipped')}
for status in ('stripped', 'skipped'):
    for row in count[status][:10]:
        print(f'  {status}: {row["path"]} ({row["why"]})')
    if len(count[status]) > 10:
        print(f'  {status}: {len(count[status]) - 10} more, all in {folder}/meta.json')
before = sum(row['characters_before'] for row in sources)
every = sum(part['tokens'] for part in (meta['train'], meta['val']))
unknown = sum(part.count(tokens.ids.get(UNKNOWN, MAX_VOCAB)) for part in ids.values())
print(f"""read         {n_files} files, {len(count['skipped'])} skipped
characters   {before:,}, cleaned {len(text):,}; {len(set(text))} different ones
begins       {text[:60]!r}
tokens       {every:,} of {V:,} kinds ({tokens.kind}), {len(text) / every:.2f} characters a token
split        {meta['train']['tokens']:,} to train, {meta['val']['tokens']:,} to validate""")
if unknown:
    print(f'unknown      {unknown:,} tokens stand for what the tokenizer does not know')
print('to be beaten ' + ', '.join(f'{name} {bits:.3f}' for name, bits in meta['yardsticks'].items())
      + ' bits per character')
print(f'written      {folder}; next: python train.py'
      + (f' --dataset={dataset}' if dataset != 'papers' else ''))
