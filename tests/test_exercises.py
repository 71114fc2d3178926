"Every exercise tells right from wrong, and one mistake from another; a learner's code does no harm, and a learner's file is left alone"
import ast, json, os, random, re, sys, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from course_lib import check as C
from course_lib.check import Exercise, Raised, diagnose, difference, isolated, mutants, proof, read_exercises, watch

ROOT = Path(__file__).resolve().parent.parent
MASTERS = sorted((ROOT/'exercises').glob('*.ipynb'))
EXERCISES = [ex for p in MASTERS for ex in read_exercises(p)]
each = pytest.mark.parametrize('ex', EXERCISES, ids=lambda ex: f'{ex.chapter[:2]}-{ex.name}')

# ---- the exercises ----

@each
def test_exercise_can_be_trusted(ex): assert proof(ex)==[]

def headings(chapter):
    cells = nbformat.read(ROOT/'nbs'/f'{chapter}.ipynb', as_version=4).cells
    return {l.lstrip('# ') for c in cells if c.cell_type=='markdown' for l in c.source.splitlines() if l.startswith('##')}

@each
def test_exercise_is_whole(ex):
    assert re.fullmatch(r'(rebuild|vary|repair|predict), \d+ minutes?, (easy|medium|hard)', ex.about), ex.about
    assert ex.text.startswith('## ') and ex.hints
    assert len(ex.wrong) >= {'predict': 2, 'repair': 3}.get(ex.about.split(',')[0], 4)
    for see in [ex.see, *[o['see'] for o in ex.wrong.values() if 'see' in o]]: assert see in headings(ex.chapter), see
    for mistake in ex.wrong: assert mistake.endswith(('.', '?')), mistake
    assert all(reason.strip() for reason in ex.equivalent.values())

def test_names_are_unique_and_kinds_are_mixed():
    names = [ex.name for ex in EXERCISES]
    assert len(names)==len(set(names))
    for p in MASTERS:
        kinds = [ex.about.split(',')[0] for ex in EXERCISES if ex.chapter==p.stem]
        assert 2 <= len(kinds) <= 6 and len(set(kinds)) > 1, (p.stem, kinds)

def test_each_chapter_has_exercises_and_says_so():
    chapters = {p.name for p in (ROOT/'nbs').glob('[0-9]*.ipynb')} - {'22_check.ipynb'}
    assert {p.name for p in MASTERS}==chapters
    for name in chapters: assert f'make learn NB={name[:2]}' in nbformat.read(ROOT/'nbs'/name, as_version=4).cells[-1].source, name

@each
def test_the_library_is_not_what_is_judged(ex):
    "A solution that stands in the library is refused by name, so that nobody is praised for importing it"
    module = __import__(f'course_lib.{ex.chapter[3:]}', fromlist=['x'])
    if callable(obj := getattr(module, ex.name, None)):
        with pytest.raises(ValueError, match="is the library's"): C.check(obj)

# ---- differences ----

numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6)

@settings(deadline=None)
@given(numbers, st.sampled_from([torch.float32, torch.float64]))
def test_what_is_the_same_has_no_difference(xs, dtype):
    t = torch.tensor(xs, dtype=dtype)
    assert difference(t, torch.tensor(xs))==difference(t.numpy(), t)==difference(xs, tuple(xs))==difference({'a': t}, {'a': t.clone()})==''

@settings(deadline=None)
@given(numbers, st.integers(0, 5), st.floats(0.01, 100))
def test_what_differs_has_one(xs, i, by):
    wanted = torch.tensor(xs, dtype=torch.float64)
    yours = wanted.clone()
    yours[i % len(xs)] += by*max(1, wanted.abs().max())
    assert difference(yours, wanted) and difference(wanted, yours)

@settings(deadline=None)
@given(numbers, st.sampled_from([-3., 0.5, 2., 10.]))
def test_a_ratio_is_named(xs, k):
    wanted = torch.tensor([1., *xs], dtype=torch.float64)
    assert f'yours is {k:.5g} × what is wanted' in difference(k*wanted, wanted)

@pytest.mark.parametrize('yours,wanted,says', [
    (torch.zeros(2,3), torch.zeros(3,2), 'shape (2, 3), and (3, 2)'), (float('nan'), 1., 'nan'), (1., float('nan'), 'yours is off: 1 and not nan'),
    (float('inf'), 1., 'yours is off: inf'), (torch.tensor([1., float('inf')]), torch.tensor([1., 2.]), '1 of 2'), (None, 3, 'yours is None, and 3 is wanted'),
    ('a', 'b', "yours is 'a'"), (3, 'b', "yours is 3, and 'b'"), ([1], [1, 2], '1 item, and 2 are'), ([1, 2], [1], '2 items, and 1 is'), ([1, 5], [1, 2], 'item 1: '), (-2., 2., 'the other sign'),
    ({'a': 1}, {'b': 1}, 'b: yours has none'), ({'a': 1, 'b': 2}, {'a': 1}, 'b: yours has 2, and there should be none'), (0., 2., 'yours is 0'),
    (Raised(ValueError('x')), 2., 'raises ValueError: x, and 2 is wanted'), (2., Raised(ValueError('x')), 'gives 2, and a ValueError'),
    (True, False, 'yours is True, and False is wanted'), (torch.tensor(True), False, 'yours is True, and False'), (None, True, 'and True is wanted'),
    (torch.zeros(2), 1., '(2,), and (), that of a single number, is wanted'), (1625948160, 60000, 'yours is off: 1625948160 and not 60000'),
    (0, 3, 'yours is 0 and not 3'), (None, 7840016, 'and 7840016 is'), (torch.ones(2), torch.tensor([1., 1e-9]), 'off: 1 and not 0 at [1]'),
    (Raised(TypeError('one\ntwo')), 2., 'TypeError: one …, and 2'), (Raised(KeyError()), Raised(AssertionError()), 'an AssertionError is wanted'),
    ({'argument 1, changed': 1}, {}, 'argument 1 is changed, and should stay'), ({}, {'argument 1, changed': 1}, 'argument 1 stays as it is, and should change'),
    ({'a': C._kept(print)}, {'a': C._kept((1, 2))}, 'yours is a builtin_function_or_method, and (1, 2) is wanted'),
    (Raised(KeyError('x')), Raised(ValueError('x')), "raises KeyError: 'x', and a ValueError"), (torch.zeros(0), torch.zeros(2), 'shape (0,)')])
def test_differences_in_words(yours, wanted, says): assert says in difference(yours, wanted)

# ---- mutants ----

def test_mutants_of_the_library_are_all_valid_and_all_different():
    for path in (ROOT/'course_lib').glob('[!_]*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if not isinstance(node, ast.FunctionDef): continue
            source = ast.unparse(node)
            for what,changed in mutants(source).items():
                compile(changed, path.name, 'exec')
                assert changed!=source, what
            assert ast.unparse(node)==source

# ---- code of others ----

EX = Exercise('f', stub='def f(x): raise NotImplementedError', solution='def f(x): return x + 1',
              wrong={'It subtracts.': {'source': 'def f(x): return x - 1'}}, probes={'one': 'watch(f, 1.)', 'two': 'watch(f, 2.)'})

def states(): return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype()

def sows(x):
    for o in (random.seed, np.random.seed, torch.manual_seed): o(7)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return x + 1

def test_global_state_is_put_back():
    before = states()
    try: assert diagnose(EX, sows).status=='right'
    finally:
        after = states()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
    assert after==before

# ---- what a learner is told ----

def test_a_wanted_error_may_say_anything():
    "The message of an error that is raised where it should be does not hide the mistake elsewhere"
    ex = Exercise('f', solution='def f(x):\n    if x<0: raise ValueError("no")\n    return x + 1', stub='def f(x): raise NotImplementedError',
                  probes={'below 0': 'f(-1)', 'two': 'f(2)'})
    def f(x):
        if x<0: raise ValueError('in my words')
        return x - 1
    assert diagnose(ex, f).mistake=='It does what our solution does with `x - 1` in place of `x + 1`.'

def test_a_missing_return_is_named_and_the_solution_is_not_given_away():
    assert diagnose(EX, lambda x: None).mistake=='It does what our solution does without its `return`.'

def test_no_second_mistake_is_guessed_from_errors():
    ex = replace(EX, wrong={'It multiplies.': {'source': 'def f(x):\n    y = x\n    return x*y'}})
    assert diagnose(ex, lambda x: y).mistake==''     # noqa: F821

def test_a_number_of_the_solution_is_told_with_what_is_around_it():
    ex = Exercise('f', solution='def f(x): return [x[3], len(x)]', stub='', probes={'one': 'f([1, 2, 3, 4, 5])'})
    assert '`x[2]` in place of `x[3]`' in diagnose(ex, lambda x: [x[2], len(x)]).mistake

def test_a_repair_that_changes_nothing_is_not_told_to_begin():
    ex = replace(EX, stub='def f(x): return x', about='repair, 5 minutes, easy')
    assert 'given code' in str(diagnose(ex, lambda x: x)) and 'in its place' in str(diagnose(replace(ex, about=''), lambda x: x))

@pytest.mark.parametrize('answer,says', [('330', "'330' is not a number"), (33, '33 is not it.'), (None, 'None is not a number'), (7840004, '7840004 is not it')])
def test_a_value_is_told_exactly(answer, says): assert says in str(diagnose(Exercise('n', solution='n = 330', stub='n = ...'), answer))

def test_what_is_told_ends_with_one_stop_and_is_short():
    def f(x):
        print('x'*100000)
        return x
    assert '?.' not in str(diagnose(EX, loops, seconds=0.3)) and len(str(diagnose(EX, f))) < 600

@pytest.mark.parametrize('given,says', [((5,), "a value is checked under its exercise's name"), (('near',), 'as in check(near)'), ((lambda: 1,), 'another name is checked'),
                                        ((), 'give it one thing')])
def test_wrong_things_to_check(course, given, says):
    with pytest.raises(ValueError) as e: C.check(*given)
    assert says in str(e.value)

def test_a_name_that_is_nearly_right(course):
    with pytest.raises(ValueError, match="called 'neer'; is it 'near'?"): C.check(neer=1)

def test_one_hint_is_one(course, capsys):
    C.hint(9, 'n_wrong')
    assert 'There is one hint, and no more' in capsys.readouterr().out

def test_prints_are_caught_and_told_in_short(capsys):
    def f(x):
        for i in range(1000): print('line', i)
        return x
    found = diagnose(EX, f)
    assert 'Your code printed: line 0 / line 1' in str(found) and len(str(found)) < 600
    assert capsys.readouterr().out==''

def loops(x):
    while True: pass
def loops_and_catches(x):
    while True:
        try: time.sleep(0.01)
        except Exception: continue
def leaves(x): sys.exit(3)
def recurses(x): return recurses(x)
def divides(x): return x/0
def changes(x): x.append(1)

@pytest.mark.parametrize('f', [loops, loops_and_catches])
def test_endless_loops_end(f):
    start = time.time()
    found = diagnose(EX, f, seconds=0.3)
    assert found.status=='not yet' and 'never ends' in found.evidence and time.time()-start < 10

@pytest.mark.parametrize('f,says', [(leaves, 'SystemExit'), (recurses, 'RecursionError'), (divides, 'ZeroDivisionError'), (lambda: 1, 'TypeError')])
def test_errors_are_outcomes(f, says):
    found = diagnose(EX, f)
    assert found.status=='not yet' and says in found.evidence

def test_ctrl_c_of_the_learner_is_not_swallowed():
    def f(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): diagnose(EX, f)

def test_it_works_in_another_thread():
    found = []
    t = threading.Thread(target=lambda: found.append(diagnose(EX, lambda x: x-1)))
    t.start()
    t.join(30)
    assert found[0].mistake=='It subtracts.'

def test_probes_share_nothing():
    seen = []
    def f(x):
        seen.append(x)
        return x + len(seen)/100
    ex = Exercise('f', setup='import torch', solution='def f(x): return x', stub='', probes={'random': 'torch.rand(1)', 'again': 'torch.rand(1)', 'list': 'xs = [1]\nf(xs)\nxs'})
    trace = ex.trace(lambda x: x.append(2))
    assert torch.equal(trace['random'], trace['again']) and trace['list']==[1, 2]

# ---- a learner's files ----

@pytest.fixture
def course(tmp_path, tool, monkeypatch):
    "tools/exercises.py in a folder with two masters"
    X = tool('exercises')
    (tmp_path/'exercises').mkdir()
    for p in MASTERS[:2]: (tmp_path/'exercises'/p.name).write_bytes(p.read_bytes())
    monkeypatch.setattr(X, 'ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(C, '_last', {})
    return X

def fill(path, sources):
    "Put sources in place of stubs"
    nb = nbformat.read(path, as_version=4)
    for c in nb.cells:
        for stub,source in sources.items():
            if c.source==stub: c.source = source
    nbformat.write(nb, path)

def test_a_copy_shows_text_and_stubs_and_nothing_else(course):
    for master in MASTERS[:2]:
        text = course.make_copy(course.master(master.stem)).read_text(encoding='utf-8')
        code = '\n'.join(c.source for c in nbformat.reads(text, 4).cells if c.cell_type=='code')
        assert '#|' not in text
        for ex in read_exercises(master):
            assert ex.stub in code and f'check({ex.name}' in code
            if ex.about.startswith('rebuild'): assert ex.solution not in code
            for o in ex.wrong.values(): assert o['source'] not in code or o['source']==ex.stub

def test_a_learners_file_is_never_overwritten(course, capsys):
    path = course.make_copy(course.master(MASTERS[0].stem))
    nb = nbformat.read(path, as_version=4)
    nb.cells[3].source = 'mine = 1'
    nb.cells = nb.cells[:-1]        # an exercise of the course that this copy lacks
    nbformat.write(nb, path)
    before = path.read_bytes()
    course.make_copy(course.master(MASTERS[0].stem))
    assert path.read_bytes()==before
    last = read_exercises(MASTERS[0])[-1].name
    assert f'New in the course: {last}' in capsys.readouterr().out
    course.make_copy(course.master(MASTERS[0].stem), add=True)
    after = nbformat.read(path, as_version=4)
    assert after.cells[:len(nb.cells)]==nb.cells and f'check({last}' in after.cells[-1].source

@pytest.mark.parametrize('master', MASTERS, ids=lambda p: p.stem)
def test_check_in_a_terminal(master, course, monkeypatch, capsys, tmp_path):
    (tmp_path/'exercises'/master.name).write_bytes(master.read_bytes())
    path,exercises = course.make_copy(course.master(master.stem)),read_exercises(master)
    args = SimpleNamespace(chapter=master.stem)
    with pytest.raises(SystemExit) as e: course.check(args)
    assert e.value.code==1 and f'0 right, 0 not yet, {len(exercises)} not attempted' in capsys.readouterr().out
    fill(path, {ex.stub: ex.solution for ex in exercises})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: course.check(args)
    out = capsys.readouterr().out
    assert e.value.code==0 and f'{len(exercises)} right, 0 not yet' in out, out
    known = json.loads((tmp_path/'work'/'progress.json').read_text())
    assert {o['status'] for o in known.values()}=={'right'}

def test_check_goes_on_after_a_broken_cell(course, capsys):
    path = course.make_copy(course.master(MASTERS[0].stem))
    fill(path, {read_exercises(MASTERS[0])[0].stub: '1/0'})
    with pytest.raises(SystemExit): course.check(SimpleNamespace(chapter=MASTERS[0].stem))
    out = capsys.readouterr().out
    assert 'ZeroDivisionError' in out and 'not attempted' in out

def test_check_shows_the_line_and_goes_on_after_an_exit(course, capsys):
    path,(first,second,*_) = course.make_copy(course.master(MASTERS[0].stem)),read_exercises(MASTERS[0])
    fill(path, {first.stub: f'def {first.name}(*args):\n    return args[0].nothing', second.stub: '%timeit 1'})
    nb = nbformat.read(path, as_version=4)
    nb.cells[2].source += '\nimport sys'
    nb.cells.insert(3, nbformat.v4.new_code_cell('sys.exit(3)'))
    nbformat.write(nb, path)
    with pytest.raises(SystemExit) as e: course.check(SimpleNamespace(chapter=MASTERS[0].stem))
    out = capsys.readouterr().out
    assert e.value.code==1 and 'ended with SystemExit: 3' in out and 'in the line `return args[0].nothing`' in out
    assert 'has a command of Jupyter in it' in out and '1 not attempted' in out

def test_ctrl_c_names_the_cell(course):
    path = course.make_copy(course.master(MASTERS[0].stem))
    fill(path, {read_exercises(MASTERS[0])[0].stub: 'raise KeyboardInterrupt'})
    with pytest.raises(SystemExit, match='stopped in cell 5'): course.check(SimpleNamespace(chapter=MASTERS[0].stem))

@pytest.mark.parametrize('text', ['', 'rubbish', '[]', '{"near": 3}'])
def test_an_unreadable_progress_file_is_put_aside(course, tmp_path, capsys, text):
    (tmp_path/'work').mkdir()
    (tmp_path/'work'/'progress.json').write_text(text)
    C.progress()
    assert 'counting starts anew' in capsys.readouterr().out
    assert (tmp_path/'work'/'progress.unreadable').read_text()==text and not (tmp_path/'work'/'progress.json').exists()

def test_a_broken_cell_is_named_before_a_swap(course):
    path = course.make_copy(course.master(MASTERS[0].stem))
    fill(path, {read_exercises(MASTERS[0])[0].stub: 'def near(a, b, eps)\n    pass'})
    with pytest.raises(SystemExit, match='a cell that is not Python yet'): course.swap(SimpleNamespace(chapter=MASTERS[0].stem, chapters=None))

def test_unknown_chapters_are_named(course):
    with pytest.raises(SystemExit, match='more than one chapter'): course.master('0')
    with pytest.raises(SystemExit, match='which chapter'): course.master('')
    with pytest.raises(SystemExit, match="starts with '77'; there are: "): course.master('77')
    with pytest.raises(SystemExit, match='is not there yet. To make it'): course.check(SimpleNamespace(chapter=MASTERS[0].stem))

# ---- your definitions in the library ----

def test_swapped_module_has_the_learners_definitions(tool):
    X = tool('exercises')
    source = 'import torch\n\nA = 1\n\n@decorated\ndef f(x):\n    return x\n\nclass G:\n    pass\n\ndef h(x): return f(x)\n'
    theirs = ['import math\nfrom course_lib.core import set_seed\nfrom course_lib.speedrun import *\nhelp_f = 1\ndef helper(x): return 2*x', 'def f(x):\n    return helper(x)']
    made,new = X.swapped(source, theirs, 'linear')
    assert new==['f'] and 'speedrun' not in made and 'decorated' not in made and 'import math' in made
    names = {}
    exec(made.replace('import torch', ''), names)
    assert names['h'](3)==6 and names['G'] and names['A']==1

def test_users_are_found_through_other_modules(tool):
    X = tool('exercises')
    direct = {p.stem for p in X.users('linear', ['mnist_loss'])}
    assert '05_optim' in direct and '04_linear' not in direct
    assert {'06_mlp', '11_learner', '18_fashion'} <= {p.stem for p in X.users('optim', ['SGD'])}

def test_a_solution_in_the_library_passes_a_chapter_and_a_mistake_does_not(tool, capsys):
    "For all of them, and all chapters: python tools/exercises.py prove --swap"
    X = tool('exercises')
    ex = next(ex for ex in EXERCISES if ex.name=='mnist_loss')
    summed = next(iter(ex.wrong))
    ex = replace(ex, wrong={summed: ex.wrong[summed]})
    assert X.prove_swap(ex, ['05'])==[]
    said = capsys.readouterr().out
    assert 'the solution: unnoticed' in said and f'{summed}: noticed by nbs/05_optim.ipynb, cell' in said, said
