"Notebooks, library, README, ledger and workflows are in step, and the chapters have the form readers rely on"
import ast, importlib, json, os, re, shutil, subprocess, sys, tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
CHAPTERS = [p for p in NBS if p.name[:2].isdigit()]
MODULES = sorted(p.stem for p in (ROOT/'course_lib').glob('*.py') if not p.stem.startswith('_'))
NUMBER = {p.stem.partition('_')[2]: int(p.name[:2]) for p in CHAPTERS}

# What should not stand in a saved output: paths of the machine that made it, and addresses in its memory
LOCAL = re.compile(rf'{re.escape(str(ROOT))}/|(?<!\w)/(home|root|Users|tmp|private)/|[A-Z]:\\\\|0x[0-9a-f]{{8,}}')

def read(path): return nbformat.read(path, as_version=4)
def outputs(nb): return [(i,o) for i,c in enumerate(nb.cells) for o in c.get('outputs', [])]
def prose(nb): return '\n'.join(c.source for c in nb.cells if c.cell_type=='markdown')
by_name = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)

@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev works on, so that a failing check leaves the checkout as it was"
    for name in 'nbs', 'course_lib': shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb*'))
    for name in 'settings.ini', 'setup.py', 'README.md': shutil.copy(ROOT/name, tmp_path)
    return tmp_path

def changed(copy, folder):
    "Files of `folder` that differ between the copy and the checkout"
    names = {p.relative_to(base).as_posix() for base in (copy,ROOT) for p in (base/folder).glob('*') if p.suffix in ('.py', '.ipynb', '.toml')}
    return sorted(n for n in names if not (copy/n).exists() or not (ROOT/n).exists() or (copy/n).read_bytes()!=(ROOT/n).read_bytes())

@pytest.mark.parametrize('command,folder', [('nbdev_export', 'course_lib'), ('nbdev_clean', 'nbs')])
def test_nbdev_changes_nothing(copy, command, folder):
    subprocess.run([BIN/command], cwd=copy, check=True, env={**os.environ, 'PYTHONPATH': str(copy)})
    assert changed(copy, folder)==[], f'run {command} and commit what it changes'

def test_readme_is_the_index(tool):
    made = tool('run').readme(read(ROOT/'nbs'/'index.ipynb'))
    assert (ROOT/'README.md').read_text(encoding='utf-8')==made, "run: make save NB=index"

def test_readme_has_the_ladder_and_every_chapter():
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    ledger = tomllib.loads((ROOT/'nbs'/'ledger.toml').read_text(encoding='utf-8'))
    for r in ledger['ladder']:
        chapter,_,name = r['accuracy'].partition('.')
        acc = ledger[chapter][name]
        row = rf"{re.escape(r['model'])} *\| .*\| {acc['expected']:.{acc.get('digits', 4)}f}( ± {acc.get('tol')})? \| \[{chapter}\]"
        assert re.search(row, readme), f'README lacks {r}; run: make save NB=index'
    for p in CHAPTERS: assert f'nbs/{p.name}' in readme

def test_ledger_rows_are_whole_and_used():
    ledger = tomllib.loads((ROOT/'nbs'/'ledger.toml').read_text(encoding='utf-8'))
    rows = {f'{c}.{k}': row for c,v in ledger.items() if c[:2].isdigit() for k,row in v.items()}
    for key,row in rows.items():
        assert {'expected','source'} <= set(row) <= {'expected','source','digits','tol','rounding','seeds'}, key
        assert ('tol' in row)==('seeds' in row), f'{key}: a tolerance needs the seeds it was measured over, and the other way round'
        assert row.get('seeds', 5)>=5, key
    used = {k for p in NBS for k in re.findall(r"expect\('(\d\d_\w+\.\w+)'", '\n'.join(c.source for c in read(p).cells if c.cell_type=='code'))}
    assert set(rows)==used & set(rows), f'rows that no chapter reports: {sorted(set(rows)-used)}'
    for r in ledger['ladder']: assert {r['accuracy'], r['params']} <= set(rows)

FRESH = '''
import sys, course_lib.{m} as m
missing = [n for n in m.__all__ if not hasattr(m, n)]
heavy = [n for n in ("matplotlib.pyplot", "pandas", "fastai", "sklearn", "tensorboard", "IPython", "graphviz") if n in sys.modules]
assert not missing, missing
assert not heavy, heavy
'''
def test_each_module_imports_alone_and_lightly(tmp_path):
    "In a fresh process outside the repository; with nothing heavy that only a plot or a comparison needs"
    def run(m): return m, subprocess.run([sys.executable, '-c', FRESH.format(m=m)], cwd=tmp_path, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool: failed = {m: r.stderr for m,r in pool.map(run, MODULES) if r.returncode}
    assert not failed

@pytest.mark.parametrize('module', MODULES)
def test_modules_import_only_earlier_ones_and_document_all_they_export(module):
    tree = ast.parse((ROOT/'course_lib'/f'{module}.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('course_lib.'):
            assert NUMBER[node.module.split('.')[1]] < NUMBER[module], f'{module} imports {node.module}'
            assert [a.name for a in node.names]!=['*'], f'{module} star-imports {node.module}'
    by_class = re.compile(r'_|forward$|state_dict$|load_state_dict$|(before|after|cleanup)_')      # said by the class
    def public(nodes): return [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not by_class.match(n.name)]
    defs = public(tree.body)
    for d in defs + [f for c in defs if isinstance(c, ast.ClassDef) for f in public(c.body)]:
        assert ast.get_docstring(d), f'{module}.{d.name} has no docstring'

# References between chapters: [chapter 05](05_optim.ipynb) in prose, "chapter 05" in code; `name` beside one must be there
STEM = {p.stem[:2]: p.stem for p in CHAPTERS}
LINK = re.compile(r'\[([^\]]*)\]\((?:nbs/)?(\d\d_\w+)\.ipynb[^)]*\)')
SAID = re.compile(r'`(?P<a>\w+)` (?:of|from|in) \[[Cc]hapter \d\d\]\((?P<b>\w+)\.ipynb\)'          # `name` of chapter 05
                  r'|`(?P<c>\w+)`,? \(\[[Cc]hapter \d\d\]\((?P<d>\w+)\.ipynb\)'                     # `name` (chapter 05
                  r"|\[[Cc]hapter \d\d\]\((?P<e>\w+)\.ipynb\)'s `(?P<f>\w+)`")                       # chapter 05's `name`
HOME = {name: module for module in MODULES for name in importlib.import_module(f'course_lib.{module}').__all__}

def wrong_references(text, code=False):
    "What is wrong with the references of `text` to chapters, as sentences"
    wrong = []
    for shown,stem in LINK.findall(text):
        if stem not in STEM.values(): wrong.append(f'{stem}.ipynb is no chapter')
        wrong += [f'[{shown}] leads to {stem}' for n in re.findall(r'^(?:[Cc]hapter )?(\d\d)\b', shown) if n!=stem[:2]]
        if (name := shown.strip('`')) in HOME and shown[0]=='`' and HOME[name]!=stem[3:]: wrong.append(f'`{name}` is in {HOME[name]}, not in {stem}')
    for m in SAID.finditer(text):
        name,stem = next((m[o],m[p]) for o,p in ('ab', 'cd', 'fe') if m[o])
        if name in HOME and HOME[name]!=stem[3:]: wrong.append(f'`{name}` is in {HOME[name]}, not in {stem}')
    bare = re.sub(r'```.*?```', '', LINK.sub('', text), flags=re.S)
    for m in re.finditer(r'\b[Cc]hapters?\s(\d\d)\b', bare):
        if m[1] not in STEM: wrong.append(f'there is no {m[0]}')
        elif not code: wrong.append(f'{m[0]} should be a link, [{m[0]}]({STEM[m[1]]}.ipynb)')
    return wrong + [f'{o} is no chapter' for o in re.findall(r'(?<![\w/.-])\d\d_[a-z]+(?=\.ipynb|\.[a-z]\w*\b)', bare) if o not in STEM.values()]

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_references_to_chapters_are_right(path):
    found = [(i+1, w) for i,c in enumerate(read(path).cells) for w in wrong_references(c.source, c.cell_type=='code')]
    assert not found

def test_references_outside_the_notebooks_are_right():
    tracked = subprocess.run(['git', 'ls-files', '*.md', '*.py', '*.toml', 'Makefile'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [o for o in tracked if not o.startswith('course_lib/') and o not in ('tests/test_repo.py', 'tests/test_tools.py') and (ROOT/o).exists()]
    found = {o: w for o in files if (w := wrong_references((ROOT/o).read_text(encoding='utf-8'), code=True))}
    assert files and not found

@pytest.mark.parametrize('text,says', [
    ('see [chapter 05](04_linear.ipynb)', 'leads to'), ('see chapter 05', 'should be a link'), ('see [chapter 77](77_none.ipynb)', 'no chapter'),
    ('the `SGD` of [chapter 04](04_linear.ipynb)', 'in optim'), ('`SGD` ([chapter 04](04_linear.ipynb))', 'in optim'),
    ("[chapter 04](04_linear.ipynb)'s `SGD`", 'in optim'), ('[`SGD`](04_linear.ipynb)', 'in optim')])
def test_a_wrong_reference_is_found(text, says): assert any(says in w for w in wrong_references(text))

def test_a_right_reference_is_not_found():
    assert not wrong_references("the `SGD` of [chapter 05](05_optim.ipynb), [`SGD`](05_optim.ipynb), and chapter 4 of the book")

@by_name
def test_tables_are_whole(path):
    "An empty line within a table would show its last rows as text"
    for i,c in enumerate(read(path).cells):
        if c.cell_type!='markdown': continue
        for table in re.findall(r'(?:^\|.*\n?)+', c.source, re.M):
            rows = table.strip().split('\n')
            assert len(rows)>2 and re.fullmatch(r'\|(\s*:?-+:?\s*\|)+', rows[1]), f'cell {i+1}: {rows[0]}'

@by_name
def test_chapter_has_its_form(path):
    nb,text = read(path),prose(read(path))
    assert nb.cells[0].source.startswith(f"# {path.stem.partition('_')[2]}: ")
    for wanted in 'Two cores:', 'You will be able to', 'Predict first', 'What goes wrong', '## Recap', '## Check yourself', '<details>': assert wanted in text, wanted
    for i,c in enumerate(nb.cells):
        drawn = any({'image/png', 'image/svg+xml'} & set(o.get('data', {})) for o in c.get('outputs', []))
        told = bool(re.match(r'#\| fig-alt: ".{20,}"', c.source))
        assert drawn==told, f'cell {i+1}: ' + ('a figure without alt text' if drawn else 'its figure was not saved')
        if c.cell_type=='code':
            long = [l for l in c.source.splitlines() if len(l)>120 and not l.startswith('#| fig-alt')]
            assert not long, f'cell {i+1}: lines over 120 columns: {long}'

@by_name
def test_saved_outputs_are_small_and_clean(path):
    nb = read(path)
    assert path.stat().st_size <= 1_000_000
    assert outputs(nb), 'no saved outputs: run make save'
    for i,o in outputs(nb):
        text = json.dumps(o)
        assert o.output_type!='error', f'cell {i+1}'
        assert len(o.get('data', {}).get('image/png', ''))*3/4 <= 100_000, f'cell {i+1}: a figure over 100 kB'
        assert o.get('name')!='stderr', f'cell {i+1} wrote to stderr: {text[:200]}'
        assert not LOCAL.search(text), f'cell {i+1}: {text[:300]}'

def test_workflows_follow_githubs_schema():
    files = sorted((ROOT/'.github'/'workflows').glob('*.yml'))
    assert files
    subprocess.run([BIN/'check-jsonschema', '--builtin-schema', 'vendor.github-workflows', *files], check=True)

def test_the_address_stands_only_in_settings():
    cfg = dict(re.findall(r'^(\w+) = (.*)$', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M))
    address = f"{cfg['user']}/{cfg['repo']}"
    grep = ['git', 'grep', '-lF', address, '--', ':!course_lib/_modidx.py']     # nbdev copies it there from settings.ini
    found = subprocess.run(grep, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert found==[], f'{address} should be taken from settings.ini in {found}'

def test_wheel_holds_the_library_and_imports(tmp_path):
    src = tmp_path/'src'
    shutil.copytree(ROOT/'course_lib', src/'course_lib', ignore=shutil.ignore_patterns('__pycache__'))
    for name in 'settings.ini', 'setup.py', 'README.md', 'LICENSE', 'MANIFEST.in': shutil.copy(ROOT/name, src)
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', tmp_path/'dist', src], check=True, stdout=subprocess.DEVNULL)
    wheel, = (tmp_path/'dist').glob('*.whl')
    assert len(list((tmp_path/'dist').glob('*.tar.gz')))==1
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel], check=True)
    code = f'import course_lib.core as c; assert c.__file__.startswith({str(tmp_path/"site")!r}), c.__file__'
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, env={**os.environ, 'PYTHONPATH': str(tmp_path/'site')})
