"""The exercises: your copies of them, checks in a terminal, and your solutions in place of the library's.

    python tools/exercises.py learn         how far you are; opens the next notebook that is not finished
    python tools/exercises.py learn 04      make work/04_linear.ipynb, if it is not there, and open it in JupyterLab
    python tools/exercises.py check 04      run your notebook here, without Jupyter, and print what its checks say
    python tools/exercises.py progress      how far you are
    python tools/exercises.py swap 04       your functions and classes in place of the library's: run the chapters that
                                            use them, against the same ledger; or only some: swap 04 --chapters 05
    python tools/exercises.py prove 04      for authors: put a chapter's exercises to the test; with --swap, put the
                                            solutions and the mistakes into the library, and see which chapters notice

What is in work/ is yours, and never overwritten; `learn 04 --add` puts exercises that are new in the course at its end."""
import argparse, ast, linecache, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tools')]
os.environ.setdefault('OMP_NUM_THREADS', '1')
from course_lib.check import Outcome, Raised, _directives, _read_progress, progress, proof, read_exercises     # noqa: E402

def master(chapter):
    "The notebook in exercises/ whose name starts with `chapter`"
    found = sorted((ROOT/'exercises').glob(f'{chapter}*.ipynb')) if chapter else []
    if len(found)==1: return found[0]
    names = ', '.join(p.stem for p in found or sorted((ROOT/'exercises').glob('*.ipynb')))
    if not chapter: sys.exit(f'which chapter? There are: {names}')
    how_many = 'more than one' if found else 'no'
    sys.exit(f"{how_many} chapter with exercises starts with {chapter!r}; there are: {names}")

def copy_of(path): return ROOT/'work'/path.name

def existing_copy(chapter):
    path = copy_of(master(chapter))
    if path.exists(): return path
    sys.exit(f'{path.relative_to(ROOT)} is not there yet. To make it: python tools/exercises.py learn {path.name[:2]}')

# ---- your copy ----

def is_definition(ex):
    "Is a function or class to be written, or a value?"
    return any(isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name==ex.name for o in ast.parse(ex.stub).body)

def cells_of(path):
    "Cells that open the learner's notebook, and for each exercise its name and its cells"
    opening,found,shared = [],{},''
    exercises = {ex.name: ex for ex in read_exercises(path)}
    text,own = None,[]
    for cell in nbformat.read(path, as_version=4).cells:
        told,rest = _directives(cell.source)
        if cell.cell_type=='markdown' and cell.source.startswith('## '): text,own = cell.source,[]
        elif cell.cell_type=='markdown' and text is None: opening.append(new_markdown_cell(cell.source))
        elif 'setup' in told and text is None: shared += rest + '\n'
        elif 'setup' in told and own is not None: own.append(new_code_cell(rest))
        elif 'stub' in told:
            ex = exercises[told['stub']]
            call = ex.name if is_definition(ex) else f'{ex.name}={ex.name}'
            found[ex.name] = [new_markdown_cell(f'{text}\n\n*{ex.about}*'), *own, new_code_cell(ex.stub),
                              new_code_cell(f'check({call})')]
            own = None
    how = ("Write your solution in place of each stub, run its cell, and then the check below it. Stuck? `hint()`, "
           f"`hint(2)`, and at last `solution()`. The chapter: [{path.stem}](../nbs/{path.name}).")
    imports = f'{shared}from course_lib.check import check, hint, solution, progress'
    return [*opening, new_markdown_cell(how), new_code_cell(imports)],found

def make_copy(path, add=False):
    "Make the learner's notebook, or say what is new in the course since it was made"
    mine = copy_of(path)
    opening,found = cells_of(path)
    kernel = {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}}
    if not mine.exists():
        mine.parent.mkdir(exist_ok=True)
        nb = new_notebook(cells=[*opening, *[c for cells in found.values() for c in cells]], metadata=kernel)
        with open(mine, 'x', encoding='utf-8') as f: nbformat.write(nb, f)
        print(f'made {mine.relative_to(ROOT)}, with {len(found)} exercises')
        return mine
    nb = nbformat.read(mine, as_version=4)
    code = '\n'.join(c.source for c in nb.cells if c.cell_type=='code')
    new = [name for name in found if f'check({name}' not in code]
    if new and add:
        nb.cells += [c for name in new for c in found[name]]
        part = mine.with_suffix('.part')
        nbformat.write(nb, part)
        part.replace(mine)
        print(f"added to the end of {mine.relative_to(ROOT)}: {', '.join(new)}")
    elif new: print(f"{mine.relative_to(ROOT)} is yours and stays as it is. New in the course: {', '.join(new)}. "
                    f"To get {'it' if len(new)==1 else 'them'}: python tools/exercises.py learn {path.name[:2]} --add")
    else: print(f'{mine.relative_to(ROOT)} is there, and stays as it is')
    return mine

def next_chapter():
    "The first chapter with an exercise that is not right yet; the last one if all are"
    known,left = _read_progress(),[p for p in sorted((ROOT/'exercises').glob('*.ipynb'))]
    for p in left:
        if any(known.get(ex.name, {}).get('status')!='right' for ex in read_exercises(p)): return p
    return left[-1]

def learn(args):
    if not args.chapter:
        progress()
        print()
    mine = make_copy(master(args.chapter) if args.chapter else next_chapter(), args.add)
    if not args.no_lab: sys.exit(subprocess.run([Path(sys.executable).parent/'jupyter', 'lab', str(mine)]).returncode)

# ---- in a terminal ----

def check(args):
    "Run the cells of the learner's notebook, print the outcome of each check, and go on after errors"
    from IPython.core.inputtransformer2 import TransformerManager
    path = existing_copy(args.chapter)
    os.chdir(path.parent)
    names,outcomes = {'__name__': '__main__'},[]
    for i,cell in enumerate(nbformat.read(path, as_version=4).cells, 1):
        if cell.cell_type!='code': continue
        name = f'<cell {i}>'
        try:
            source = TransformerManager().transform_cell(cell.source)
            if 'get_ipython()' in source:
                print(f'cell {i} of {path.name} is left out: it has a command of Jupyter in it\n')
                continue
            linecache.cache[name] = len(source),None,source.splitlines(True),name     # for errors to show
            body = ast.parse(source, name).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), name, 'exec'), names)
            value = last and eval(compile(ast.Expression(last.value), name, 'eval'), names)
        except KeyboardInterrupt: sys.exit(f'\nstopped in cell {i} of {path.name}')
        except (Exception, SystemExit) as e:
            print(f'cell {i} of {path.name} ended with {Raised(e)}\n')
            continue
        if isinstance(value, Outcome):
            outcomes.append(value.status)
            print(value, end='\n\n')
    print(', '.join(f'{outcomes.count(o)} {o}' for o in ('right', 'not yet', 'not attempted')))
    sys.exit(0 if outcomes and set(outcomes)=={'right'} else 1)

# ---- your definitions in place of the library's ----

def top_level(source):
    "Names and source of the functions and classes that are defined in `source`"
    lines = source.splitlines()
    for o in ast.parse(source).body:
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)):
            first = min([o.lineno, *[d.lineno for d in o.decorator_list]]) - 1
            yield o.name,slice(first, o.end_lineno),'\n'.join(lines[first:o.end_lineno])

def code_of(path):
    "The code cells of a notebook, but for those that begin with a command of IPython's"
    cells = nbformat.read(path, as_version=4).cells
    return [c.source for c in cells if c.cell_type=='code' and not c.source.lstrip().startswith(('%', '!'))]

def number(module):
    "The chapter's number of a module of the library"
    return int(next(iter((ROOT/'nbs').glob(f'[0-9]*_{module}.ipynb')), Path('99')).name[:2])

def imports_for(source, module):
    "Imports of the learner's that the module can have too: none of the library's own at or after it"
    for o in ast.parse(source).body:
        name = getattr(o, 'module', None) or ''
        if isinstance(o, ast.Import) or isinstance(o, ast.ImportFrom) and (
            not name.startswith('course_lib') or number(name.partition('.')[2])<number(module)): yield ast.unparse(o)

def swapped(source, theirs, module):
    "The source of a module with the learner's definitions `theirs` in place of its own; and the names of these"
    mine = {}
    for text in theirs: mine |= {name: code for name,_,code in top_level(text)}
    own = {name: where for name,where,_ in top_level(source)}
    new = [n for n in mine if n in own]
    lines = source.splitlines()
    for name in sorted(new, key=lambda n: -own[n].start): lines[own[name]] = mine[name].splitlines()
    helpers = [o for text in theirs for o in imports_for(text, module)] + [code for n,code in mine.items() if n not in own]
    first = min([own[n].start for n in new], default=0)
    return '\n'.join([*lines[:first], *helpers, *lines[first:]]) + '\n',new

def mentions(code, names): return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(ast.parse(code)))

def dependents(source, names):
    "`names`, and what is defined in `source` with the help of them, directly or through others"
    found,before = set(names),0
    while len(found)>before:
        before = len(found)
        found |= {name for name,_,code in top_level(source) if mentions(code, found)}
    return found

def users(module, names):
    "Notebooks that use one of `names` of a module of the library, directly or through other modules"
    used = {module: dependents((ROOT/'course_lib'/f'{module}.py').read_text(encoding='utf-8'), names)}
    def uses(source):
        tree = ast.parse(source)
        for o in ast.walk(tree):
            if isinstance(o, ast.ImportFrom) and (o.module or '').rpartition('.')[2] in used:
                wanted = used[o.module.rpartition('.')[2]]
                got = {a.name for a in o.names}
                if got & wanted or '*' in got and wanted & {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}: return True
    for path in sorted((ROOT/'course_lib').glob('*.py'), key=lambda p: number(p.stem)):
        source = path.read_text(encoding='utf-8')
        if path.stem not in used and uses(source): used[path.stem] = {n for n,_,code in top_level(source)}
    found = []
    for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        code = '\n'.join(code_of(path))
        if path.stem.partition('_')[2]!=module and uses(code): found.append(path)
    return found

def swap(args):
    from run import run_all, measured
    path = existing_copy(args.chapter)
    module = path.stem.partition('_')[2]
    exercises = read_exercises(master(args.chapter))
    stubs = {ast.unparse(ast.parse(ex.stub)) for ex in exercises}
    for o in code_of(path):
        try: ast.parse(o)
        except SyntaxError as e:
            sys.exit(f'{path.relative_to(ROOT)} has a cell that is not Python yet ({e.msg}):\n\n    {e.text}')
    theirs = [o for o in code_of(path) if 'check(' not in o and ast.unparse(ast.parse(o)) not in stubs]
    library = (ROOT/'course_lib'/f'{module}.py').read_text(encoding='utf-8')
    source,new = swapped(library, theirs, module)
    if not {ex.name for ex in exercises} & {name for name,*_ in top_level(library)}:
        sys.exit(f'nothing to swap: course_lib.{module} has none of the functions and classes of these exercises')
    if not new: sys.exit(f'{path.relative_to(ROOT)} defines nothing yet that is in course_lib.{module}')
    able = users(module, new)
    chapters = [p for p in able if not args.chapters or p.name[:2] in args.chapters]
    named = ', '.join(p.stem for p in chapters or able)
    if not chapters: sys.exit(f"no {'such' if named else 'other'} chapter uses {', '.join(new)}" + (named and f'; these do: {named}'))
    print(f"yours: {', '.join(new)}. Chapters that use them: {named}, about {sum(map(measured, chapters))/2:.0f} s")
    with tempfile.TemporaryDirectory() as temp:
        os.environ.update(with_module(temp, module, source))
        try: run_all(chapters)
        except SystemExit as e:
            sys.exit(f"{e}\n\nThat came out with your {', '.join(new)}. What does yours do that ours does not? "
                     f'python tools/exercises.py check {path.name[:2]}')
    print(f"with your {', '.join(new)}, everything came out as the ledger expects it")

def with_module(temp, module, source):
    "Copy the library into `temp`, with `source` as one of its modules; returns the environment in which it is found first"
    shutil.copytree(ROOT/'course_lib', Path(temp)/'course_lib', ignore=shutil.ignore_patterns('__pycache__'))
    (Path(temp)/'course_lib'/f'{module}.py').write_text(source, encoding='utf-8')
    return {'PYTHONPATH': os.pathsep.join([temp, *filter(None, [os.environ.get('PYTHONPATH')])]),
            'COURSE_DATA': os.environ.get('COURSE_DATA') or str(ROOT/'data')}

# ---- for authors ----

def prove(args):
    "Print how far an exercise can be trusted, and how long its check takes"
    from course_lib.check import diagnose
    bad = 0
    for path in [master(args.chapter)] if args.chapter else sorted((ROOT/'exercises').glob('*.ipynb')):
        for ex in read_exercises(path):
            start = time.time()
            diagnose(ex, object())
            seconds,faults = time.time()-start,proof(ex)
            print(f'{path.stem} {ex.name}: {len(ex.wrong)} mistakes, {len(ex.probes)} probes, {seconds:.1f} s without a name')
            if args.swap: faults += prove_swap(ex, args.chapters)
            bad += len(faults)
            for o in faults: print('   -', o)
    sys.exit(bad>0)

def noticed(module, source, chapters):
    "Where the first of `chapters` fails that does with `source` as a module of the library; empty if none does"
    from run import measured
    with tempfile.TemporaryDirectory() as temp:
        env = {**os.environ, **with_module(temp, module, source)}
        for chapter in sorted(chapters, key=measured):      # the quickest first
            run = [sys.executable, ROOT/'tools'/'run.py', chapter.name[:2]]
            found = subprocess.run(run, capture_output=True, text=True, env=env)
            if found.returncode: return next(o for o in (found.stdout + found.stderr).splitlines() if ', cell ' in o)
    return ''

def prove_swap(ex, only=None):
    "What is wrong when the solution, and each mistake, is put into the library and chapters run: as sentences"
    module,faults = ex.chapter.partition('_')[2],[]
    library = (ROOT/'course_lib'/f'{module}.py').read_text(encoding='utf-8')
    if ex.name not in {name for name,*_ in top_level(library)}: return []
    chapters = [p for p in users(module, [ex.name]) if not only or p.name[:2] in only]
    for title,text,unseen in [('the solution', ex.solution, True), *[(k, o['source'], 'unseen' in o) for k,o in ex.wrong.items()]]:
        source,_ = swapped(library, ['\n'.join(imports_for(ex.setup, module)), text], module)
        where = noticed(module, source, chapters)
        print(f"     {title}: {'noticed by ' + where if where else 'unnoticed'}", flush=True)
        if bool(where)==unseen: faults.append(f"swapped in, {title}: {where or 'no chapter notices'}")
    return faults

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('command', choices=['learn', 'check', 'progress', 'swap', 'prove'])
    p.add_argument('chapter', nargs='?', default='', help='the first letters of a chapter, such as 04')
    p.add_argument('--add', action='store_true', help='learn: put new exercises at the end of your notebook')
    p.add_argument('--no-lab', action='store_true', help='learn: only make the notebook')
    p.add_argument('--chapters', nargs='+', help='swap, prove --swap: run these chapters only, such as 05 06')
    p.add_argument('--swap', action='store_true', help='prove: also with the solutions and mistakes in the library')
    args = p.parse_args()
    os.chdir(ROOT)
    if args.command=='progress': progress()
    else: globals()[args.command](args)

if __name__ == '__main__': main()
