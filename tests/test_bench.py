"The benchmark: its statistics on made-up clocks, that every row runs, and that both sides of a row do the same work"
import json, os, sys
from importlib.util import find_spec

import pytest, torch

TINY = 1/100

@pytest.fixture
def bench(tool, monkeypatch, tmp_path):
    "tools/bench.py, with its results in a folder of this test"
    monkeypatch.setenv('OMP_NUM_THREADS', os.environ.get('OMP_NUM_THREADS', '1'))      # loading it sets this one
    bench = tool('bench')
    bench.OUT = tmp_path/'_bench'
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench
    torch.set_num_threads(threads)

def made_up(bench, calls=None, **kwargs):
    "A match whose sides say what they took: ours 2, 4, 6 …, a peer 4, and a peer 8"
    calls = [] if calls is None else calls
    def ours(): calls.append('ours'); return 2.*calls.count('ours')
    def side(name, t): return lambda: calls.append(name) or t
    return bench.Match('work', {'ours': ours, 'a': side('a', 4.), 'b': side('b', 8.)}, clock=bench.told, **kwargs)

def test_sides_take_turns_after_a_turn_that_does_not_count(bench):
    calls = []
    taken = bench.race(made_up(bench, calls, most=1.), rounds=3, seconds=0)
    assert calls==['ours','a','b']*4 and taken==[{'ours': t, 'a': 4., 'b': 8.} for t in (4.,6.,8.)]
    assert len(bench.race(made_up(bench, most=1., warm=False), 3, 0))==3
    assert 3 < len(bench.race(made_up(bench, most=1.), 3, 0.05)) <= 99

def test_ratio_is_the_median_of_the_rounds_and_the_goal_decides(bench):
    m = made_up(bench, most=1.5)
    a,b = bench.judge(m, bench.race(m, 3, 0))
    assert (a['peer'],a['value'],a['q1'],a['q3'],a['low'],a['high'],a['reached'])==('a', 1.5, 1.25, 1.75, 1., 2., True)
    assert (b['value'],b['sign'],b['rounds'],b['ours'],b['theirs'])==(0.75, '≤', 3, 6., 8.)
    m = made_up(bench, least=1.)
    a,b = bench.judge(m, bench.race(m, 3, 0))
    assert (round(a['value'], 3),a['sign'],a['reached'])==(0.667, '≥', False) and b['reached']
    b, = bench.judge(made_up(bench, least={'b': 1.}), [dict(ours=4., a=1., b=8.)])
    assert b['peer']=='b' and b['value']==2
    a, = bench.judge(made_up(bench, most=1.05, fastest=True), [dict(ours=4., a=4., b=8.)]*3)
    assert a['peer']=='a' and a['value']==1 and a['reached']

def test_stopwatch_stops_the_collector_and_starts_it_again(bench):
    import gc
    seen = []
    assert 0 <= bench.stopwatch(lambda: seen.append(gc.isenabled())) < 1
    def fails(): raise ValueError
    with pytest.raises(ValueError): bench.stopwatch(fails)
    assert seen==[False] and gc.isenabled()

def sides(bench, name, i=0): return next(m for j,m in enumerate(bench.ROWS[name](TINY)) if j==i).sides
def close(a, b, **kwargs): torch.testing.assert_close([o.detach() for o in a], [o.detach() for o in b], **kwargs)

@pytest.mark.parametrize('peer,package', [('loop_by_hand','torch'), ('fastai_fit','fastai'), ('lightning_fit','pytorch_lightning')])
def test_loop_trains_to_the_same_weights(bench, peer, package):
    if not find_spec(package): pytest.skip(f'{package} is not here; make bench installs it')
    xy = bench.digits(200)
    ours,theirs = bench.our_fit(*xy),getattr(bench, peer)(*xy)
    for epoch in range(2):
        want = list(ours().parameters())
        assert not torch.equal(want[0], next(bench.mlp().parameters()))
        close(theirs().parameters(), want, rtol=1e-4, atol=1e-6)

@pytest.mark.skipif(not find_spec('pytorch_lightning'), reason='Lightning is not here; make bench installs it')
def test_loop_has_all_peers(bench):
    assert [list(m.sides) for m in bench.loop(TINY)]==[['Learner','loop by hand, ours'], ['Learner',"loop by hand, torch's"],
        ['Learner','fastai','Lightning','Lightning, bare','no loop']]

@pytest.mark.parametrize('i', [0,1,2], ids=['SGD','Adam','AdamW'])
def test_optim_steps_to_the_same_parameters(bench, i):
    ours,*peers = sides(bench, 'optim', i).values()
    for step in range(3):
        want = ours()
        for peer in peers: close(peer(), want, rtol=1e-4, atol=1e-6)

def test_modules_have_the_same_gradients(bench):
    ours,theirs = [side() for side in sides(bench, 'modules').values()]
    close(ours, theirs)
    close([p.grad for p in ours], [p.grad for p in theirs], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('i', [0,1,2], ids=['small','bytes','floats'])
def test_batches_have_the_same_items(bench, i):
    s = sides(bench, 'batches', i)
    ours,theirs = s['DataLoader'].args[0], s['torch'].args[0]
    def items(dl):
        x,y = (torch.cat(o) for o in zip(*dl))
        assert not torch.equal(y, torch.arange(len(y)))
        return x[y.argsort()], y.sort().values
    assert [len(x) for x,y in ours]==[len(x) for x,y in theirs]
    close(items(ours), items(theirs), rtol=0, atol=0)

def test_images_have_the_same_pixels(bench):
    found = {}
    for m in bench.ROWS['images'](TINY):        # the files are there until the loop goes on
        alone = m.sides.pop('no loader')
        alone()     # it ends
        for name,side in m.sides.items(): found[name] = [torch.cat([torch.as_tensor(o) for o in part]) for part in zip(*side.args[0])]
        size, = {bench_size(f) for f in side.args[0].dataset.items[:2]}
        assert size==160
        m.sides.clear()
    (x,y),(tx,ty),(fx,fy) = found.values()
    close([x, y], [tx, ty], rtol=0, atol=0)
    assert x.shape==fx.shape and x.shape[1:]==(3,64,64) and x.std()>0.1 and y.tolist()==fy.tolist()
    assert (x - fx).abs().mean() < 0.02         # ours decodes a JPEG at half its size where that is enough

def bench_size(f):
    from PIL import Image
    with Image.open(f) as im: return min(im.size)

def test_baseline_predicts_the_same(bench):
    ours,theirs = [side() for side in sides(bench, 'baseline').values()]
    assert (ours==theirs).float().mean() > 0.99 and ours.unique().tolist()==list(range(10))

def test_speedrun_learns(bench):
    match, = bench.ROWS['speedrun'](1/20)
    accs = {name: side() for name,side in match.sides.items()}
    assert accs['speed_learner']>0.5 and accs['classic recipe']>0.8, accs

def test_imports_are_timed_in_fresh_processes(bench):
    s = sides(bench, 'imports')
    assert set(s)=={'course_lib', '0.15 s', 'fastai.basics'} and s['0.15 s']()==0.15 and 0 < s['course_lib']() < 60

@pytest.mark.skipif(sys.platform!='linux', reason='shares of memory are counted on Linux only')
def test_memory_is_what_was_allocated(bench, capsys):
    kept = []
    assert 4e6 < bench.held(lambda: torch.ones(1000,1000)) < 4.5e6
    assert 4e6 < bench.held(lambda: [torch.ones(1000,1000) for _ in range(5)] and None) < 25e6
    assert 1e6 < bench.held(lambda: kept.append(bytes(10**6))) < 1.5e6
    assert 30e6 < bench.grown(lambda: kept.append(torch.ones(10_000_000))) < 60e6
    for name in 'ours','by hand':
        bench.in_child(f'held/{name}', 256)         # what the child processes run
        assert 1e5 < float(capsys.readouterr().out) < 1e6
    assert all(side.func is bench.bytes_in_child for side in sides(bench, 'memory').values())

def test_growth_compares_slopes(bench):
    m = next(bench.ROWS['growth'](TINY))
    for side in m.sides.values(): side()
    assert m.value({'1×': 2., '4×': 5., '16×': 17.})==1 and m.value({'1×': 1., '4×': 4., '16×': 28.})==2
    assert bench.straight({'16×': 17., '4×': 5., '1×': 2.})=='R² 1.0000'

def result(bench, **kwargs):
    r, = bench.judge(bench.Match('work', {'ours': None, 'peer': None}, **{'most': 1.05, **kwargs}), [dict(ours=1., peer=2.)]*3)
    return r | dict(row='loop')

def test_table_chart_and_page(bench, tmp_path):
    results = [result(bench), result(bench, most=0.3)]
    table = bench.markdown(results, 'two cores')
    assert '| loop | work | peer | 1 s | 2 s | 2 | 3 | 0.5 (0.5–0.5) | ≤ 1.05 | reached |' in table
    assert '| ≤ 0.3 | falls short |' in table and table.endswith('Read on two cores.\n')
    bench.draw(results, tmp_path/'a.png')
    assert (tmp_path/'a.png').read_bytes()[1:4]==b'PNG'
    page = tmp_path/'page.md'
    page.write_bytes(bench.PAGE.read_bytes())
    for _ in range(2): bench.save_page(table, page)
    text = page.read_text(encoding='utf-8')
    assert text.count('Read on two cores.')==1 and text.startswith('# How fast is it?') and text.endswith('<!-- end of the table -->\n')
    page.write_text('no marks')
    with pytest.raises(SystemExit, match='page.md needs the lines'): bench.save_page(table, page)

@pytest.mark.parametrize('goal,quick', [(9., False), (.1, False), (.1, True)])
def test_says_at_the_end_what_falls_short(bench, monkeypatch, capsys, goal, quick):
    def fake(k=1.): yield bench.Match('work', {'ours': lambda: 1., 'peer': lambda: 2.}, most=goal, clock=bench.told, seconds=0)
    monkeypatch.setattr(bench, 'ROWS', {'fake': fake})
    monkeypatch.setattr(bench, 'install_peers', lambda: None)
    monkeypatch.setattr(bench, 'version', lambda name: '1')
    monkeypatch.setattr(bench.os, 'sched_setaffinity', lambda *args: None, raising=False)
    monkeypatch.setattr(sys, 'argv', ['bench.py'] + ['--quick']*quick)
    bench.main()
    assert ('fall short:\n  fake, work, peer: 0.5, wanted ≤ 0.1' in capsys.readouterr().out)==(goal<.5)
    saved = json.loads((bench.OUT/'bench.json').read_text(encoding='utf-8'))
    assert saved['results'][0]['value']==0.5 and len(saved['results'][0]['all'])==(3 if quick else 9)
    assert sorted(p.name for p in bench.OUT.iterdir())==['bench.json', 'bench.md', 'bench.png']

def test_peers_are_installed_once(bench, monkeypatch):
    monkeypatch.setattr(bench, 'version', lambda name: '1')
    monkeypatch.setattr(bench.subprocess, 'run', lambda *args, **kwargs: pytest.fail('installed again'))
    bench.install_peers()
