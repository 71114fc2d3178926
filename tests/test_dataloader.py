"The loader's promises: every item once, the same batches for any number of workers, and no process left behind"
import copy, gc, os, pickle, random, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, psutil, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import multiprocessing as mp
from torch.utils import data as torch_data

from course_lib.dataloader import BatchError, DataLoader, DataLoaders, Dataset, Normalize, collate
from course_lib.core import set_seed

posix = pytest.mark.skipif(sys.platform=='win32', reason='signals and fork are POSIX')

class Numbers:
    "Items are their own numbers, and a random draw of each generator"
    def __init__(self, n=50): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return i, random.random(), np.random.rand(), torch.rand(2)

class Failing(Numbers):
    def __getitem__(self, i):
        if i==17: raise OSError(f'no file {i}.png')
        return i

class Dying(Numbers):
    def __getitem__(self, i):
        if i==25: os.kill(os.getpid(), signal.SIGKILL)
        return i

class Leaving(Numbers):
    def __getitem__(self, i): sys.exit(3)

class Unsendable(Numbers):
    def __getitem__(self, i): return lambda: i

class Counting(Numbers):
    def __init__(self, n): self.n,self.count = n,mp.Value('i')
    def __getitem__(self, i):
        with self.count.get_lock(): self.count.value += 1
        return i

class Sleeping(Numbers):
    def __getitem__(self, i): time.sleep(60)

def first(items): return items[0]

def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(equal, a, b))
    return a==b

def gone(pids, wait=10):
    "Have all these processes ended, at the latest after `wait` seconds?"
    until = time.time() + wait
    def alive(p):
        try: return psutil.Process(p).status()!=psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return False
    while any(map(alive, pids)):
        if time.time()>until: return False
        time.sleep(0.02)
    return True

def worker_pids(dl): return [p.pid for p in dl._workers.processes]

@pytest.fixture(autouse=True)
def nobody_stays_behind():
    yield
    gc.collect()
    assert mp.active_children()==[]

# ---- the order ----

@given(n=st.integers(0, 150), bs=st.integers(1, 70), shuffle=st.booleans(), drop_last=st.booleans(), seed=st.none() | st.integers(0, 2**70))
@settings(max_examples=150, deadline=None)
def test_each_item_comes_once_per_epoch(n, bs, shuffle, drop_last, seed):
    x = torch.arange(n)
    kwargs = dict(bs=bs, shuffle=shuffle, drop_last=drop_last, seed=seed)
    set_seed(n); whole = DataLoader(Dataset(x, x*2), **kwargs)
    epochs = [list(whole), list(whole)]
    set_seed(n); by_item = DataLoader(list(zip(x, x*2)), **kwargs)
    assert equal([list(by_item), list(by_item)], epochs)        # asked as a whole or one by one: the same
    for batches in epochs:
        assert len(batches)==len(whole)==(n//bs if drop_last else (n+bs-1)//bs)
        xs = [i for xb,yb in batches for i in xb.tolist()]
        assert all(torch.equal(yb, xb*2) for xb,yb in batches)
        assert all(len(xb)==bs for xb,yb in batches[:-1])
        assert len(set(xs))==len(xs)==(n//bs*bs if drop_last else n) and set(xs) <= set(range(n))
        if not shuffle: assert xs==sorted(xs)
    if shuffle and n>20 and len(whole): assert not equal(*epochs)

def test_order_is_that_of_every_machine():
    dl = DataLoader(list(range(10)), bs=10, shuffle=True, seed=42)
    assert [b.tolist() for b in dl] + [b.tolist() for b in dl]==ORDERS

ORDERS = [[0, 4, 2, 7, 8, 3, 9, 5, 1, 6], [1, 3, 6, 5, 7, 9, 0, 2, 4, 8]]

def test_seeds_and_epochs_are_unrelated():
    def orders(seed):
        dl = DataLoader(list(range(50)), bs=50, shuffle=True, seed=seed)
        return [tuple(next(iter(dl)).tolist()) for epoch in range(4)]
    assert len({o for seed in range(4) for o in orders(seed)})==16

# ---- workers ----

def test_same_batches_and_luck_for_any_number_of_workers():
    def two_epochs(n, **kwargs):
        dl = DataLoader(Numbers(), bs=8, n_workers=n, **kwargs)
        for batch in dl: break                                  # an epoch left early counts, and leaves nothing behind
        return [list(dl), list(dl)]
    for kwargs in dict(shuffle=True, seed=5), dict(seed=5, drop_last=True):
        alone = two_epochs(0, **kwargs)
        assert not equal(*alone)
        for n in (1, 2, 3): assert equal(two_epochs(n, **kwargs), alone)
    def seeded(n): set_seed(3); return two_epochs(n, shuffle=True)
    assert equal(seeded(1), seeded(2))                          # without a seed, torch's generator rules

def test_epoch_can_be_put_back():
    dl = DataLoader(Numbers(), shuffle=True, seed=1, n_workers=1)
    epochs = [list(dl) for _ in range(3)]
    assert dl.epoch==3
    other = DataLoader(Numbers(), shuffle=True, seed=1)
    other.epoch = 2
    assert equal(list(other), epochs[2])

def test_workers_live_as_long_as_the_loader():
    dl = DataLoader(Numbers(), n_workers=2)
    list(dl); pids = worker_pids(dl)
    list(dl); assert worker_pids(dl)==pids
    assert set(pids) <= {p.pid for p in psutil.Process().children()}
    del dl
    assert gone(pids)

def test_two_loops_over_one_loader():
    dl = DataLoader(Numbers(), bs=4, n_workers=2, seed=1)
    alone = DataLoader(Numbers(), bs=4, seed=1)
    a,b = list(alone),list(alone)
    assert equal(list(zip(dl, dl)), list(zip(a, b)))
    outer = iter(dl); next(outer)
    alone.epoch = 3; want = list(alone)
    assert equal(list(dl), want) and len(list(outer))==len(dl)-1

def test_no_more_than_two_batches_per_worker_are_made_ahead():
    ds = Counting(1000)
    dl = DataLoader(ds, bs=10, n_workers=2)
    batches = iter(dl); next(batches)
    time.sleep(0.5)
    assert 10*2 <= ds.count.value <= 10*(1+2*2)
    del batches, dl

def test_batches_do_not_change_when_later_ones_come():
    x = torch.arange(4000.).reshape(1000, 4)
    dl = DataLoader(Dataset(x, x[:,0]), bs=10, n_workers=2)
    kept = list(dl)
    assert torch.equal(torch.cat([xb for xb,yb in kept]), x)
    fds = psutil.Process().num_fds() if hasattr(psutil.Process, 'num_fds') else 0
    kept += list(dl)
    if fds: assert psutil.Process().num_fds() <= fds+2          # batches hold no file open
    kept[0][0].zero_()
    assert torch.equal(kept[1][0], x[10:20]) and torch.equal(next(iter(dl))[0], x[:10])

@pytest.mark.parametrize('n', [0, 2])
def test_exception_names_the_item(n):
    dl = DataLoader(Failing(), bs=4, n_workers=n)
    for epoch in range(2):                                      # the workers survive it
        got = []
        with pytest.raises(BatchError, match=r'item 17 failed with OSError: no file 17\.png') as e:
            for b in dl: got += b.tolist()
        assert got==list(range(16))
        cause = e.value.__cause__
        if n: assert 'in __getitem__' in str(cause) and 'OSError: no file 17.png' in str(cause)
        else: assert isinstance(cause, OSError)

@pytest.mark.parametrize('n', [0, 1])
def test_batch_that_cannot_be_collated(n):
    items = [torch.zeros(3)]*4 + [torch.zeros(2)]
    with pytest.raises(BatchError, match=r'items 3, 4 failed with ValueError: collate: .*\(2,\), \(3,\)'):
        list(DataLoader(items, bs=3, n_workers=n))

def test_batch_that_cannot_be_sent():
    with pytest.raises(BatchError, match='items 0, 1 cannot be sent by a worker'):
        list(DataLoader(Unsendable(), bs=2, n_workers=1, collate=first))

@posix
def test_killed_worker_is_an_error_and_the_next_epoch_starts_anew():
    dl = DataLoader(Dying(), bs=4, n_workers=2)
    with pytest.raises(BatchError, match=r'worker 0 was killed \(SIGKILL\) before the batch of items 24, 25, 26, … \(4 of them\) was ready. If memory'):
        list(dl)
    dl = DataLoader(Numbers(), bs=4, n_workers=2, seed=1)
    it = iter(dl); next(it)
    pids = worker_pids(dl)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(BatchError, match='worker 1 was killed'): list(it)
    assert gone(pids)
    with pytest.raises(BatchError, match='begin a new epoch'): dl._workers._ask(0, 0, [1])
    alone = DataLoader(Numbers(), bs=4, seed=1); alone.epoch = 1
    assert equal(list(dl), list(alone))

def test_worker_that_leaves():
    with pytest.raises(BatchError, match='worker 0 ended with exit code 3'): list(DataLoader(Leaving(), n_workers=2))

def test_busy_workers_end_with_the_loader():
    dl = DataLoader(Sleeping(), n_workers=2)
    iter(dl)
    pids = worker_pids(dl)
    for i in range(2): dl._workers._ask(i, 0, [i])
    time.sleep(0.2)
    start = time.time()
    del dl
    gc.collect()
    assert gone(pids) and time.time()-start < 5     # not the 60 s that an item takes

def test_copies_do_not_share_workers():
    dl = DataLoader(Numbers(), n_workers=1, seed=1)
    a = list(dl)
    for other in copy.deepcopy(dl), pickle.loads(pickle.dumps(dl)):
        other.epoch = 0
        assert other._workers is None and equal(list(other), a)

# ---- other ways to start, and to end, a process ----

SCRIPT = '''
import os, signal, sys, time
import torch.multiprocessing as mp
import numpy as np, random, torch
from course_lib.dataloader import DataLoader
class Numbers:
    def __len__(self): return 50
    def __getitem__(self, i): return i, random.random(), np.random.rand(), torch.rand(2)
class Sleeping(Numbers):
    def __getitem__(self, i): time.sleep(60)
def flat(dl): return [o for batch in dl for part in batch for o in part.flatten().tolist()]
def main(how):
    if how in ('spawn', 'forkserver'): mp.set_start_method(how)
    if how=='file_system': mp.set_sharing_strategy(how)
    dl = DataLoader(Numbers(), bs=4, shuffle=True, n_workers=2, seed=1)
    alone = DataLoader(Numbers(), bs=4, shuffle=True, seed=1)
    if how in ('spawn', 'forkserver', 'file_system'):
        for epoch in range(2): assert flat(dl)==flat(alone)
    else:
        it = iter(dl); next(it)
    print(*[p.pid for p in dl._workers.processes], flush=True)
    if how=='exception': 1/0
    if how in ('sigkill', 'sigint'): time.sleep(60)
    if how=='sigint_waiting':
        slow = DataLoader(Sleeping(), n_workers=1)
        it2 = iter(slow)
        print('waiting', flush=True)
        next(it2)
if __name__=='__main__': main(sys.argv[1])
'''

def start(tmp_path, how):
    (tmp_path/'script.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, 'script.py', how], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=sys.platform!='win32')

@pytest.mark.parametrize('how', ['spawn', pytest.param('file_system', marks=posix), 'end', 'exception'])
def test_script_ends_and_leaves_nobody(tmp_path, how):
    p = start(tmp_path, how)
    out,err = p.communicate(timeout=60)
    pids = [int(o) for o in out.split()]
    assert len(pids)==2, err
    assert p.returncode==(how=='exception'), err
    assert ('ZeroDivisionError' in err)==(how=='exception')
    if how!='exception': assert err==''
    assert gone(pids)

@posix
@pytest.mark.parametrize('how', ['sigkill', 'sigint', 'sigint_waiting'])
def test_script_that_is_killed_or_interrupted_leaves_nobody(tmp_path, how):
    p = start(tmp_path, how)
    pids = [int(o) for o in p.stdout.readline().split()]
    if how=='sigint_waiting':
        assert p.stdout.readline()=='waiting\n'
        time.sleep(0.3)
        pids += [c.pid for c in psutil.Process(p.pid).children()]
    if how=='sigkill': p.kill()
    else: os.killpg(p.pid, signal.SIGINT)                       # Ctrl-C goes to the whole group
    out,err = p.communicate(timeout=30)
    if how!='sigkill': assert err.count('KeyboardInterrupt')==1 and err.count('Traceback')==1, err
    assert gone(pids)

def test_spawn_cannot_see_a_class_of_the_main_script_and_says_so(tmp_path):
    code = '''if 1:
    import torch.multiprocessing as mp
    from course_lib.dataloader import BatchError, DataLoader
    class Own:
        def __len__(self): return 3
        def __getitem__(self, i): return i
    mp.set_start_method('spawn')
    try: list(DataLoader(Own(), n_workers=1))
    except BatchError as e: print(e)
    '''
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60)
    assert 'ended with exit code 1' in r.stdout and 'put it into a module' in r.stdout, r.stderr

# ---- the rest ----

@given(shape=st.lists(st.integers(0, 4), max_size=3), n=st.integers(1, 5), dtype=st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float64, torch.bool]))
@settings(max_examples=60, deadline=None)
def test_collate_stacks_as_pytorch_does(shape, n, dtype):
    items = [(torch.rand(shape).mul(9).to(dtype), {'i': i, 'name': str(i)}, np.full(2, i)) for i in range(n)]
    ours,theirs = collate(items),torch_data.default_collate(items)
    assert equal([ours[0], *ours[1].values(), ours[2]], [theirs[0], *theirs[1].values(), theirs[2]])

@given(shape=st.sampled_from([(5, 3, 4, 2), (6, 5), (7, 4, 3)]), scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_normalize_and_back(shape, scale, shift):
    set_seed(0)
    xb = torch.randn(shape, dtype=torch.float64)*scale + shift
    norm = Normalize.fit(xb)
    dims = (0,2,3) if len(shape)==4 else tuple(range(len(shape)))
    assert norm(xb).mean(dims).abs().max()<1e-3 and (norm(xb).std(dims, correction=0)-1).abs().max()<1e-3
    assert (norm.decode(norm(xb))-xb).abs().max()<1e-9
    assert equal(pickle.loads(pickle.dumps(norm))(xb), norm(xb))

def test_number_of_classes():
    x = torch.zeros(4, 2)
    def c(ds): return DataLoaders.from_datasets(ds, ds).c
    assert c(Dataset(x, torch.tensor([0, 5, 1, 2])))==6
    assert c(Dataset(x, torch.tensor([True, False, True, True])))==2
    class Named(Numbers): classes = ['cat', 'dog', 'eel']
    assert c(Named())==3
    for ds in Dataset(x, torch.zeros(4)), Dataset(x, ['a']*4), Numbers():
        with pytest.raises(TypeError, match='number of classes'): c(ds)
