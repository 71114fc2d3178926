"The loader's promises: every item once, the same batches for any number of workers, and no process left behind"
import copy, gc, json, os, pickle, random, signal, subprocess, sys, threading, time, warnings
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np, pandas as pd, psutil, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import multiprocessing as mp
from torch.utils import data as torch_data

from course_lib.dataloader import BatchError, DataLoader, DataLoaders, Dataset, Normalize, _mix, collate
from course_lib.core import set_seed

posix = pytest.mark.skipif(sys.platform=='win32', reason='signals and fork are POSIX')
pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')     # three workers on two cores

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
    def __init__(self, code): self.n,self.code = 50,code
    def __getitem__(self, i): os._exit(self.code)

class Unsendable(Numbers):
    def __getitem__(self, i): return lambda: i

class Asked(Numbers):
    "Remembers which items were asked for, also by workers"
    def __init__(self, n): self.n,self.counts = n,mp.Array('i', n)
    def __getitem__(self, i):
        with self.counts.get_lock(): self.counts[i] += 1
        return super().__getitem__(i)

class Sleeping(Numbers):
    def __getitem__(self, i): time.sleep(60)

class Large(Numbers):
    def __getitem__(self, i): return torch.full((100_000,), float(i))

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

def worker_pids(dl): return [p.pid for p in dl._engine.workers()]

def generators(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

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

# ---- what may be changed, and when ----

@pytest.mark.parametrize('n_workers', [0, 2])
def test_what_is_replaced_counts_from_the_next_epoch(n_workers):
    def batches(dl): return [b.tolist() for b in dl]
    dl = DataLoader(list(range(10)), bs=4, n_workers=n_workers, seed=1)
    before = batches(dl)
    for name,value in dict(ds=list(range(20, 26)), bs=3, shuffle=True, seed=2, drop_last=True, collate=lambda items: torch.tensor(items)*2,
                           n_workers=2-n_workers).items():
        loop = iter(dl)
        got = [next(loop).tolist()]
        setattr(dl, name, value)
        assert got + batches(loop)==before, name                # not in the middle of an epoch
        settings = {k: getattr(dl, k) for k in ('ds', 'bs', 'shuffle', 'seed', 'drop_last', 'collate')}
        alone = DataLoader(**settings)
        alone.epoch = dl.epoch
        after = batches(dl)
        assert after==batches(alone) and (after!=before or name in ('drop_last', 'n_workers')), name
        dl.epoch -= 1; before = batches(dl); dl.epoch -= 1
        assert before==after

def test_new_workers_only_where_they_are_needed():
    dl = DataLoader(Numbers(), n_workers=2, seed=1)
    list(dl); pids = worker_pids(dl)
    dl.bs,dl.shuffle,dl.seed = 7,True,None
    list(dl); assert worker_pids(dl)==pids
    dl.ds = Numbers(20)
    list(dl); assert not set(worker_pids(dl)) & set(pids) and gone(pids)

def test_what_is_replaced_is_checked():
    dl = DataLoader(Numbers(), seed=1)
    for name,value in dict(bs=0, n_workers=-1, seed=-1, epoch=1.5, ds=zip([1])).items():
        before = getattr(dl, name); setattr(dl, name, value)
        with pytest.raises((ValueError, TypeError), match='a dataset needs' if name=='ds' else f'DataLoader: {name} is'): list(dl)
        setattr(dl, name, before)
    assert dl.epoch==0 and len(list(dl))==1

def test_numbers_of_numpy_and_torch_are_numbers():
    a = DataLoader(Numbers(), bs=np.int64(8), seed=np.uint8(3), n_workers=np.int32(0), shuffle=np.bool_(True))
    b = DataLoader(Numbers(), bs=torch.tensor(8), seed=3, shuffle=True)
    assert len(a)==len(b)==7 and equal(list(a), list(b))
    assert json.loads(json.dumps(a.state_dict()))==a.state_dict()==b.state_dict()
    for kwargs in dict(bs=True), dict(bs=64.), dict(seed=True), dict(seed=0.5), dict(n_workers=None), dict(bs=np.nan):
        with pytest.raises(ValueError, match=f'DataLoader: {next(iter(kwargs))} is'): DataLoader(Numbers(), **kwargs)

# ---- randomness ----

@pytest.mark.parametrize('n_workers', [0, 2])
def test_a_seeded_loader_leaves_the_generators_alone(n_workers):
    for dl in DataLoader(Numbers(), shuffle=True, n_workers=n_workers, seed=1), DataLoader(torch_data.TensorDataset(torch.zeros(9)), n_workers=n_workers, seed=1):
        before = generators()
        for _ in range(2): list(dl)
        next(iter(dl))
        assert generators()==before

@pytest.mark.parametrize('n_workers,shuffle', [(0, True), (2, True), (2, False)])
def test_an_unseeded_epoch_draws_once(n_workers, shuffle):
    dl = DataLoader(list(range(9)), bs=2, shuffle=shuffle, n_workers=n_workers)
    for _ in range(2):
        set_seed(3); torch.randint(2**32, ()); want = generators()
        set_seed(3); loop = iter(dl)
        assert generators()==want
        list(loop)
        assert generators()==want

@pytest.mark.parametrize('n_workers', [0, 2])
@pytest.mark.parametrize('kwargs', [dict(seed=1), dict(seed=1, shuffle=True), dict(shuffle=True), {}])
def test_a_peek_is_the_next_batch_and_leaves_no_trace(n_workers, kwargs):
    for ds in Numbers(), Dataset(torch.arange(50), torch.arange(50)):
        dl = DataLoader(ds, bs=8, n_workers=n_workers, **kwargs)
        for epoch in range(2):
            set_seed(epoch); before = generators()
            peek = dl.one_batch()
            assert generators()==before and dl.epoch==epoch and mp.active_children()==[] or epoch
            assert equal(dl.one_batch(), peek)
            assert equal(list(dl)[0], peek)

def test_a_peek_during_a_loop_and_into_nothing():
    dl = DataLoader(Numbers(), bs=8, seed=1, shuffle=True)
    loop = iter(dl); next(loop)
    peek = dl.one_batch()
    assert len(list(loop))==6 and equal(next(iter(dl)), peek)
    with pytest.raises(ValueError, match='one_batch: there is none in DataLoader of 0 batches'): DataLoader([]).one_batch()

# ---- one loop at a time ----

@pytest.mark.parametrize('n_workers', [0, 2])
@pytest.mark.parametrize('tensors', [True, False])
def test_two_loops_over_one_loader_are_refused_and_one_that_was_left_is_not_in_the_way(n_workers, tensors):
    dl = DataLoader(Dataset(torch.arange(50), torch.arange(50)) if tensors else Numbers(), bs=4, n_workers=n_workers, seed=1)
    refused = dict(match='a loop over this loader is under way.*make a second loader')
    for _ in range(2):
        with pytest.raises(RuntimeError, **refused): list(zip(dl, dl))
        with pytest.raises(RuntimeError, **refused):
            for a in dl:
                for b in dl: pass
        loop = iter(dl)
        with pytest.raises(RuntimeError, **refused): iter(dl)         # also before its first batch, and after
        next(loop)
        with pytest.raises(RuntimeError, **refused): next(iter(dl))
        epoch = dl.epoch
        assert len(list(loop))==12                                  # the loop that was there first goes on
        for _ in range(3): next(iter(dl))                           # an iterator that was dropped
        for b in dl: break
        list(islice(dl, 2))
        kept = None
        def body():
            for b in dl: raise KeyError('in the loop')
        try: body()
        except KeyError as e: kept = e                              # an exception that is kept, with its frames
        def batches(): yield from dl
        next(batches())
        assert len(list(dl))==13 and dl.epoch==epoch+8
        assert kept.args==('in the loop',)

@pytest.mark.parametrize('n_workers', [0, 1])
def test_two_threads_in_one_loader(n_workers):
    dl = DataLoader(Numbers(), bs=10, shuffle=True, n_workers=n_workers)
    barrier = threading.Barrier(4)
    def go(_):
        barrier.wait()
        try: loop = iter(dl)
        except RuntimeError as e: loop = e
        barrier.wait()                                              # nobody is done before all have tried
        return loop if isinstance(loop, RuntimeError) else len(list(loop))
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool: got = list(pool.map(go, range(4)))
        assert got.count(5)==1 and sum('make a second loader' in str(o) for o in got)==3

def test_a_loader_works_in_another_thread():
    with ThreadPoolExecutor(1) as pool: there = pool.submit(lambda: list(DataLoader(Numbers(), bs=8, n_workers=2, seed=1))).result()
    assert equal(there, list(DataLoader(Numbers(), bs=8, seed=1)))

@posix
def test_workers_that_were_begun_in_a_pool_of_threads_end_well():
    "At its end, Python waits for the pool's threads; a forked worker is one of them"
    with ThreadPoolExecutor(2) as pool:
        dl = DataLoader(Numbers(), bs=8, n_workers=2, seed=1)
        got = pool.submit(lambda: list(dl)).result()
    assert equal(got, list(DataLoader(Numbers(), bs=8, seed=1)))
    processes = dl._engine.workers()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        del dl
        assert [p.exitcode for p in processes]==[0, 0]

# ---- stop, and go on ----

@given(n=st.integers(0, 40), bs=st.integers(1, 15), shuffle=st.booleans(), drop_last=st.booleans(), seed=st.none() | st.integers(0, 2**70),
       n_workers=st.sampled_from([(0, 0), (0, 0), (0, 2), (2, 0), (2, 2)]), random_items=st.booleans(), epochs=st.integers(0, 2), data=st.data())
@settings(max_examples=80, deadline=None)
def test_going_on_is_as_if_nothing_had_happened(n, bs, shuffle, drop_last, seed, n_workers, random_items, epochs, data):
    if seed is None and n_workers[0]!=n_workers[1]: random_items = False    # without a seed, items depend on who makes them
    ds = Asked(n) if random_items else Dataset(torch.arange(n), torch.arange(n))
    a,b = (DataLoader(ds, bs, shuffle, o, drop_last=drop_last, seed=seed) for o in n_workers)
    set_seed(n)
    for _ in range(epochs): list(a)
    k,loop = data.draw(st.integers(0, len(a))),iter(a)
    done = [next(loop) for _ in range(k)]
    state,saved = json.loads(json.dumps(a.state_dict())),(random.getstate(), np.random.get_state(), torch.get_rng_state())
    assert (state['epoch'], state['position'])==(epochs + (k>0), k)
    want = [list(loop), list(a), list(a)][0<k==len(a):]             # a new epoch begins, if that one was complete
    if random_items: ds.counts[:] = [0]*n
    b.load_state_dict(state)
    assert b.state_dict()==state or k==len(a)
    for f,o in zip((random.setstate, np.random.set_state, torch.set_rng_state), saved): f(o)
    got = [list(b)]
    if random_items and k<len(a): assert not any(ds.counts[i] for batch in done for i in batch[0].tolist())
    assert equal(got + [list(b) for _ in want[1:]], want)
    assert b.state_dict()==a.state_dict()

def test_a_loop_that_was_left_has_no_position():
    dl = DataLoader(Numbers(), bs=8, seed=1)
    for b in dl: state = dl.state_dict(); break
    assert (state['epoch'], state['position'])==(1, 1) and dl.state_dict()==state | {'position': 0}
    dl.load_state_dict(state)                                       # but one can go back
    assert len(list(dl))==6 and len(list(dl))==7 and dl.epoch==2

def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    dl = DataLoader(Numbers(), bs=8, shuffle=True, seed=1)
    list(dl)
    other = DataLoader(Numbers(40), bs=4, drop_last=True)
    state,before = dl.state_dict(),other.state_dict()
    with pytest.raises(ValueError, match='n was 50 and is 40 here, bs was 8 and is 4 here, shuffle was True and is False here, '
                       'drop_last was False and is True here, seed was 1 and is None here'): other.load_state_dict(state)
    assert other.state_dict()==before
    bad = {'position is 8': dict(position=8), 'position is True': dict(position=True), 'position is -1': dict(position=-1), 'epoch is 1.5': dict(epoch=1.5),
           'epoch is 0': dict(epoch=0, position=1), 'draw is -1': dict(draw=-1), "draw is 'x'": dict(draw='x'), 'more is unknown': dict(more=1)}
    for says,change in bad.items():
        with pytest.raises(ValueError, match=f'load_state_dict: .*{says}'): dl.load_state_dict(state | change)
    for k in state:
        with pytest.raises(ValueError, match=f'{k} is missing'): dl.load_state_dict({o: v for o,v in state.items() if o!=k})
    assert dl.state_dict()==state
    loop = iter(dl); next(loop)
    with pytest.raises(RuntimeError, match='load_state_dict: a loop over this loader is under way'): dl.load_state_dict(state)
    assert len(list(loop))==6

@pytest.mark.parametrize('n_workers', [0, 2])
def test_an_epoch_that_was_loaded_is_not_finished_with_another_number_of_items(n_workers):
    items = list(range(20))
    dl = DataLoader(items, bs=4, shuffle=True, n_workers=n_workers, seed=1)
    loop = iter(dl); next(loop); state = dl.state_dict(); loop.close()
    dl.load_state_dict(state)
    items.append(20)
    for f in dl.state_dict, dl.one_batch, lambda: list(dl):
        with pytest.raises(ValueError, match='loaded is in the middle of 20 items, and the dataset has 21 now; .*dl.epoch -= 1'): f()
    with pytest.raises(ValueError, match='n was 20 and is 21 here'): dl.load_state_dict(state)
    dl.epoch -= 1                                                   # the remedy
    assert sorted(torch.cat(list(dl)).tolist())==items and dl.epoch==1
    dl.load_state_dict(dl.state_dict())                             # between two epochs, any number will do
    items.append(21)
    assert sorted(torch.cat(list(dl)).tolist())==items and dl.epoch==2

@pytest.mark.parametrize('state', [None, 3, [], 'epoch', [('epoch', 0)], {}, {'epoch': 0}], ids=str)
def test_what_is_no_state_is_refused_by_name(state):
    dl = DataLoader(Numbers(), seed=1)
    with pytest.raises(ValueError, match='load_state_dict: (got a .*, but a dict is wanted|.* is missing)'): dl.load_state_dict(state)
    assert len(list(dl))==1

def test_what_is_replaced_after_loading_counts_from_the_next_epoch_too():
    dl = DataLoader(list(range(20)), bs=4, shuffle=True, seed=1)
    want = list(dl)
    dl.load_state_dict(dl.state_dict() | dict(position=2))
    dl.bs = 10
    assert equal(list(dl), want[2:]) and [len(b) for b in dl]==[10, 10]
    dl.bs = 4
    dl.load_state_dict(dl.state_dict() | dict(position=2))
    dl.epoch = 0                                                    # said otherwise: from the start
    assert equal(list(dl), want)

# ---- workers ----

def test_same_batches_for_any_number_of_workers():
    def epochs(n, **kwargs):
        dl = DataLoader(Numbers(), bs=8, n_workers=n, **kwargs)
        for batch in dl: break                                  # an epoch left early counts, and leaves nothing behind
        return [list(dl), list(dl), next(iter(dl)), list(dl)]
    for kwargs in dict(shuffle=True, seed=5), dict(seed=5, drop_last=True):
        alone = epochs(0, **kwargs)
        assert not equal(alone[0], alone[1])
        for n in (1, 2, 3): assert equal(epochs(n, **kwargs), alone)
    def seeded(n): set_seed(3); return epochs(n, shuffle=True)
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

def test_no_more_than_two_batches_per_worker_are_made_ahead():
    ds = Asked(1000)
    dl = DataLoader(ds, bs=10, n_workers=2)
    batches = iter(dl); next(batches)
    time.sleep(0.5)
    assert 10*2 <= sum(ds.counts) <= 10*(1+2*2)
    del batches, dl

def test_batches_do_not_change_when_later_ones_come():
    x = torch.arange(4000.).reshape(1000, 4)
    dl = DataLoader(Dataset(x, x[:,0]), bs=10, n_workers=2)
    kept = list(dl)
    assert torch.equal(torch.cat([xb for xb,yb in kept]), x)
    fds = psutil.Process().num_fds() if hasattr(psutil.Process, 'num_fds') else 0
    kept += list(dl)
    if fds: assert psutil.Process().num_fds() <= fds+2          # small ones hold no file open
    kept[0][0].zero_()
    assert torch.equal(kept[1][0], x[10:20]) and torch.equal(next(iter(dl))[0], x[:10])

@pytest.mark.skipif(sys.platform!='linux', reason='counts open files')
def test_large_batches_that_nobody_took_are_let_go():
    dl = DataLoader(Large(40), bs=4, n_workers=2, seed=1)
    assert equal(list(dl), list(DataLoader(Large(40), bs=4)))
    def files(): return [psutil.Process(p).num_fds() for p in (os.getpid(), *worker_pids(dl))]
    next(iter(dl)); next(iter(dl)); before = files()
    for _ in range(10): next(iter(dl))
    list(dl); next(iter(dl))
    assert max(a-b for a,b in zip(files(), before)) <= 4

@pytest.mark.parametrize('n', [0, 2])
def test_exception_names_the_item(n):
    dl = DataLoader(Failing(), bs=4, n_workers=n)
    for epoch in range(2):                                      # the workers survive it
        got = []
        with pytest.raises(BatchError) as e:
            for b in dl: got += b.tolist()
        assert str(e.value)=='DataLoader: item 17 failed with OSError: no file 17.png' and got==list(range(16))
        if n: assert 'in __getitem__' in e.value.__notes__[0] and 'OSError: no file 17.png' in e.value.__notes__[0]
        else: assert isinstance(e.value.__cause__, OSError)
        if n: pids = worker_pids(dl) if not epoch else pids; assert worker_pids(dl)==pids

@pytest.mark.parametrize('ds', [Failing(), pytest.param(Dying(), marks=posix)])
def test_a_loader_whose_item_failed_goes_with_its_last_name(ds):
    "Its workers, too; the garbage collector need not come"
    gc.disable()
    try:
        dl = DataLoader(ds, bs=4, n_workers=2)
        with pytest.raises(BatchError) as e: list(dl)
        del dl, e
        assert mp.active_children()==[]
    finally: gc.enable()

@pytest.mark.parametrize('n', [0, 1])
def test_batch_that_cannot_be_collated(n):
    items = [torch.zeros(3)]*4 + [torch.zeros(2)]
    with pytest.raises(BatchError, match=r'items 3, 4 failed with ValueError: collate: .*\(2,\), \(3,\)'):
        list(DataLoader(items, bs=3, n_workers=n))

def test_batch_that_cannot_be_sent():
    dl = DataLoader(Unsendable(), bs=2, n_workers=1, collate=first)
    for _ in range(2):
        with pytest.raises(BatchError, match='items 0, 1 cannot be sent by a worker'): list(dl)

def test_whatever_can_be_sent_arrives():
    batch = [torch.arange(3), torch.tensor(3.), torch.zeros(0, 4), torch.ones(3, dtype=torch.bfloat16), torch.arange(6).reshape(2, 3).T, torch.tensor([1j]),
             torch.arange(100_000), np.eye(3), np.str_('a'), 'text', b'bytes', None, {'k': (1, [2.])}]
    for got in DataLoader(Sent(batch), bs=1, n_workers=1, collate=first):
        assert repr(got)==repr(batch)
        got[0].zero_(); got[6].zero_(); got[7].fill(0)

class Sent:
    def __init__(self, item): self.item = item
    def __len__(self): return 2
    def __getitem__(self, i): return copy.deepcopy(self.item)

@posix
def test_killed_worker_is_an_error_at_once_and_the_next_epoch_starts_anew():
    dl = DataLoader(Dying(), bs=4, n_workers=2)
    start = time.time()
    with pytest.raises(BatchError, match=r'^DataLoader: worker 0 was killed \(SIGKILL\) before its batch was ready. If memory'): list(dl)
    assert time.time()-start < 4                                # PyTorch looks after its workers every 5 s; it was told before
    dl = DataLoader(Numbers(), bs=4, n_workers=2, seed=1)
    it = iter(dl); next(it)
    pids = worker_pids(dl)
    def kill_one():
        os.kill(worker_pids(dl)[1], signal.SIGKILL)
        time.sleep(4)
    with pytest.raises(RuntimeError, match='killed by signal'): kill_one()      # wherever the main thread is
    with pytest.raises(BatchError, match=r'worker 1 was killed \(SIGKILL\)'): list(it)
    assert gone(pids)
    alone = DataLoader(Numbers(), bs=4, seed=1); alone.epoch = 1
    assert equal(list(dl), list(alone))
    pids = worker_pids(dl)
    with pytest.raises(RuntimeError, match='killed by signal'): kill_one()      # between two epochs
    assert equal(list(dl), list(alone)) and gone(pids)

@pytest.mark.parametrize('code,says', [(3, 'worker 0 ended with exit code 3'), (0, 'exited unexpectedly')])
def test_worker_that_leaves(code, says):
    with pytest.raises(BatchError, match=says): list(DataLoader(Leaving(code), n_workers=1))

def test_copies_do_not_share_workers():
    dl = DataLoader(Numbers(), n_workers=1, seed=1)
    a = list(dl); loop = iter(dl); next(loop)
    for other in copy.copy(dl), copy.deepcopy(dl), pickle.loads(pickle.dumps(dl)):
        other.epoch = 0
        assert other._engine is None and equal(list(other), a)

# ---- other ways to start, and to end, a process ----

SCRIPT = """
import os, signal, sys, time
import torch.multiprocessing as mp
import numpy as np, random, torch
from course_lib.dataloader import DataLoader
class Numbers:
    def __len__(self): return 50
    def __getitem__(self, i): return i, random.random(), np.random.rand(), torch.rand(2)
class Sleeping(Numbers):
    def __getitem__(self, i):
        if i>10: time.sleep(60)
        return i
def flat(batches): return [o for batch in batches for part in batch for o in part.flatten().tolist()]
def main(how):
    if how in ('spawn', 'forkserver'): mp.set_start_method(how)
    if how=='file_system': mp.set_sharing_strategy(how)
    dl = DataLoader(Sleeping() if 'busy' in how else Numbers(), bs=4, shuffle='busy' not in how, n_workers=2, seed=1)
    alone = DataLoader(Numbers(), bs=4, shuffle=True, seed=1)
    it = iter(dl); next(it)
    pids = [p.pid for p in dl._engine.workers()]
    if how in ('spawn', 'forkserver', 'file_system'):
        state = dl.state_dict()
        del it; next(iter(alone))
        for epoch in range(2): assert flat(dl)==flat(alone)
        dl.load_state_dict(state)
        alone.epoch = 0; assert flat(dl)==flat(list(alone)[1:])
        with_one = DataLoader(Numbers(), bs=4, shuffle=True, n_workers=1, seed=1)
        alone.epoch = 0; assert flat(with_one)==flat(alone)
    print(*pids, flush=True)
    if how=='exception': 1/0
    if how in ('sigkill', 'sigkill_busy', 'sigint'): time.sleep(60)
    if how=='sigint_busy': next(it); next(it); next(it)
    if how=='sigint_caught':
        next(it)                    # both workers have begun
        def handler(*_): print('caught', flush=True)
        signal.signal(signal.SIGINT, handler)
        print('ready', flush=True)
        time.sleep(1)
        assert flat(it)
if __name__=='__main__': main(sys.argv[1])
"""

def start(tmp_path, how):
    (tmp_path/'script.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, 'script.py', how], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=sys.platform!='win32')

@pytest.mark.parametrize('how', ['spawn', pytest.param('forkserver', marks=posix), pytest.param('file_system', marks=posix), 'end', 'end_busy', 'exception'])
def test_script_ends_and_leaves_nobody(tmp_path, how):
    p = start(tmp_path, how)
    begin = time.time()
    out,err = p.communicate(timeout=60)
    pids = [int(o) for o in out.split()]
    assert len(pids)==2, err
    assert p.returncode==(how=='exception'), err
    assert ('ZeroDivisionError' in err)==(how=='exception')
    err = [o for o in err.splitlines() if 'resource_tracker' not in o and 'warnings.warn' not in o]    # without fork, Python counts PyTorch's
    if how!='exception': assert not err                                                               # semaphores while they are put away
    assert gone(pids) and time.time()-begin < 40

@posix
@pytest.mark.parametrize('how', ['sigkill', 'sigkill_busy', 'sigint', 'sigint_busy'])
def test_script_that_is_killed_or_interrupted_leaves_nobody(tmp_path, how):
    p = start(tmp_path, how)
    pids = [int(o) for o in p.stdout.readline().split()]
    time.sleep(0.5)
    begin = time.time()
    if 'sigkill' in how: p.kill()
    else: os.killpg(p.pid, signal.SIGINT)                       # Ctrl-C goes to the whole group
    out,err = p.communicate(timeout=30)
    if 'sigint' in how: assert err.count('KeyboardInterrupt')==1 and err.count('Traceback')==1, err
    assert len(pids)==2 and gone(pids) and time.time()-begin < 4      # though an item takes 60 s

@posix
def test_a_program_that_handles_ctrl_c_itself_keeps_its_workers(tmp_path):
    p = start(tmp_path, 'sigint_caught')
    pids = [int(o) for o in p.stdout.readline().split()]
    assert p.stdout.readline()=='ready\n'
    os.killpg(p.pid, signal.SIGINT)
    out,err = p.communicate(timeout=30)
    assert (out, err, p.returncode)==('caught\n', '', 0) and gone(pids)

FORKED = """
import gc, os
from course_lib.dataloader import DataLoader
class Collecting:
    def __len__(self): return 8
    def __getitem__(self, i): gc.collect(); return i
def begun(n_workers):
    dl = DataLoader(Collecting(), bs=2, n_workers=n_workers)
    dl.loop = iter(dl); next(dl.loop)
    return dl
gc.disable()
dl = begun(2); dl.me = dl; del dl               # as a Learner and its callbacks: a cycle, for the garbage collector to find
print(len(list(DataLoader(Collecting(), bs=2, n_workers=2))))
dl = begun(1)
pid = os.fork()
if not pid:
    dl.loop = None
    n = len(list(dl))
    del dl
    os._exit(n)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(list(dl.loop)))
"""

@posix
def test_loaders_of_another_process_are_left_alone(tmp_path):
    "A worker collects garbage, and the loaders of the process it was forked from are none of it; nor are they a child's"
    (tmp_path/'script.py').write_text(FORKED)
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    r = subprocess.run([sys.executable, '-W', 'ignore', 'script.py'], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60)
    assert (r.stdout, r.stderr, r.returncode)==('4\n4 3\n', '', 0)

def test_spawn_cannot_see_a_class_of_the_main_script_and_says_so(tmp_path):
    code = """if 1:
    import torch.multiprocessing as mp
    from course_lib.dataloader import BatchError, DataLoader
    class Own:
        def __len__(self): return 3
        def __getitem__(self, i): return i
    mp.set_start_method('spawn')
    try: list(DataLoader(Own(), n_workers=1))
    except BatchError as e: print(e)
    """
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, text=True, capture_output=True, timeout=60)
    assert 'ended with exit code 1' in r.stdout and 'must be in a module' in r.stdout, r.stderr

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
    for y in [0, 5, 1, 2], (0, 5, 1, 2), np.array([0, 5, 1, 2]), list(torch.tensor([0, 5, 1, 2])): assert c(Dataset(x, y))==6
    a,b = torch_data.random_split(Dataset(x, [0, 1, 2, 0]), [3, 1])
    assert c(a)==c(b)==c(torch_data.Subset(b, [0]))==3 and c(torch_data.Subset(Named(), [1]))==3
    for ds in Dataset(x, torch.zeros(4)), Dataset(x, ['a']*4), Dataset(x, [0., 1., 2., 3.]), Dataset(x[:0], []), Dataset(x, [None]*4), Numbers(), torch_data.Subset(Numbers(), [1]):
        with pytest.raises(TypeError, match='number of classes'): c(ds)
    for ds in torch_data.TensorDataset(x), [(x, 1)]:
        with pytest.raises(TypeError, match=f'from a {type(ds).__name__} without targets `y`'): c(ds)

def test_loaders_whose_classes_have_other_numbers_are_refused():
    class Named(Numbers):
        def __init__(self, *classes): super().__init__(4); self.classes = classes
    abc,ac = Named('a', 'b', 'c'),Named('a', 'c')
    for valid in ac, Named('c', 'b', 'a'), Named('a', 'b', 'c', 'd'), torch_data.Subset(ac, [1]):
        for make in DataLoaders.from_datasets, lambda *dss: DataLoaders(*map(DataLoader, dss)), lambda *dss: DataLoaders(*map(torch_data.DataLoader, dss)):
            with pytest.raises(ValueError, match='the classes are a, b, c for training, and .* for validation.*classes of the first'): make(abc, valid)
    for valid in Named('a', 'b', 'c'), torch_data.Subset(abc, [1]), Numbers(): assert DataLoaders.from_datasets(abc, valid).c==3
    nameless,array = Named(),Named(); nameless.classes,array.classes = None,np.array(['a', 'b', 'c'])
    for valid in nameless, array: assert DataLoaders.from_datasets(abc, valid).c==3

@pytest.mark.parametrize('kind,same', [(lambda d: OrderedDict(d), True), (lambda d: defaultdict(int, d), True), (MappingProxyType, False)])
def test_mappings_keep_their_type(kind, same):
    batch = collate([kind({'b': 1, 'a': 'x'})]*2)
    assert type(batch) is type(kind({})) if same else type(batch) is dict
    assert list(batch)==['b', 'a'] and equal(batch['b'], torch.tensor([1, 1])) and batch['a']==['x', 'x']

def test_texts_of_numpy_and_read_only_and_flipped_arrays_make_batches_without_a_warning(tmp_path):
    assert collate([np.str_('a'), 'b'])==['a', 'b']
    path = tmp_path/'a.png'
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with Image.open(path) as im: a = np.asarray(im)
        assert not a.flags.writeable
        for n in (0, 1):
            flipped,whole = next(iter(DataLoader([(a[:,::-1], a)]*2, n_workers=n)))
            assert flipped.tolist()==[[[2, 1, 0], [5, 4, 3]]]*2
            whole.zero_()
            assert a.sum()==15
        std = np.ones(3); std.flags.writeable = False
        Normalize(std, std)(torch.ones(2, 3, 1, 1))
    read_only = subprocess.run([sys.executable, '-W', 'error', '-c', 'import numpy as np; from course_lib.dataloader import *; a = np.zeros(3); '
                                'a.flags.writeable = False; print(collate([a, a]).shape)'], capture_output=True, text=True,
                               env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)})      # torch warns once per process
    assert read_only.stdout=='torch.Size([2, 3])\n', read_only.stderr

@pytest.mark.parametrize('n', [0, 1])
def test_types_are_promoted_the_same_with_workers(n):
    for items in [torch.zeros(2), torch.ones(2).double()], [torch.zeros(2).long(), torch.ones(2)], [np.zeros(2, np.float32), np.ones(2)]:
        want = torch.stack([torch.as_tensor(o) for o in items])
        assert repr(next(iter(DataLoader(items, n_workers=n))))==repr(want)

def test_items_that_are_not_alike_are_refused_by_name():
    for items,says in [([{'a': 1}, {'a': 1, 'b': 2}], "not all have 'b'"), ([{'a': 1, 'c': 2}, {'a': 1}], "not all have 'c'"), ([(1, 2), (1,)], r'\[1, 2\]'),
                       ([1, 'a'], 'int, str'), ([None]*2, 'NoneType'), ([torch.zeros(3), np.zeros(3)], 'Tensor, ndarray')]:
        with pytest.raises((ValueError, TypeError), match=says): collate(items)
    with pytest.raises(ValueError, match=r'different shapes, \(1,\), \(2,\), \(3,\), \(4,\), …;'): collate([torch.zeros(i) for i in (5, 3, 1, 4, 2)])

@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('shape', [(0,), (200, 200, 3), (1000,), (3, 0, 2)])
def test_large_batches_and_items_of_zero_bytes(shape, shuffle):
    n = 23 if 0 in shape or len(shape)>1 else 700
    x,y = torch.arange(n)[(..., *[None]*len(shape))].expand(n, *shape).float(), torch.arange(n)
    dl = DataLoader(Dataset(x, y), bs=5, shuffle=shuffle, seed=1)
    batches = list(dl)
    assert len(batches)==len(dl)==-(-n//5) and [len(yb) for xb,yb in batches[:-1]]==[5]*(len(dl)-1)
    order = torch.cat([yb for xb,yb in batches])
    assert order.sort().values.equal(y) and (order.equal(y)!=shuffle)
    assert all(xb.shape==(len(yb), *shape) and torch.equal(xb, x[yb]) for xb,yb in batches)

def test_pandas_goes_by_place():
    y = pd.Series([0, 1, 2, 3], index=[2, 0, 3, 1])
    ds = Dataset(torch.arange(4), y)
    assert [int(ds[i][1]) for i in range(4)]==[0, 1, 2, 3]
    assert equal(list(DataLoader(ds, bs=3)), [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])), (torch.tensor([3]), torch.tensor([3]))])
    table = pd.DataFrame({'a': [1., 2, 3, 4], 'b': [5., 6, 7, 8]}, index=y.index)
    xb,yb = next(iter(DataLoader(Dataset(table, y))))
    assert xb.tolist()==[[1, 5], [2, 6], [3, 7], [4, 8]] and yb.tolist()==[0, 1, 2, 3]
    assert next(iter(DataLoader(Dataset(y.index, y.astype(str)))))[1]==['0', '1', '2', '3']
    assert DataLoaders.from_datasets(ds, ds).c==4
    for o in y, table:
        with pytest.raises(TypeError, match=rf'numbered by their places, and {type(o).__name__} lacks them; take Dataset\(x, y\)'): DataLoader(o)

def test_statistics_of_normalize():
    with pytest.raises(ValueError, match=r'standard deviation is \[1\.0, 0\.0, 2\.0\]'): Normalize([0., 0., 0.], [1., 0., 2.])
    x = torch.rand(3, 4, 5)
    mean,std = torch.tensor([0.1, 0.2, 0.3], requires_grad=True),torch.tensor([1., 2., 4.], requires_grad=True)
    norm = Normalize(mean*1, std)
    want = (x - mean.detach()[:,None,None])/std.detach()[:,None,None]
    assert equal(norm(x), want) and equal(norm(x[None])[0], want) and not norm(x).requires_grad      # one image, and a batch of one
    assert (norm.decode(norm(x))-x).abs().max()<1e-6
    xb = x[None].clone().requires_grad_()
    fitted = Normalize.fit(xb)
    assert not fitted.mean.requires_grad and fitted(xb).requires_grad
    for bad in x[:2], x[0], x[None,None][...,0]:
        if bad.ndim<3 or bad.shape[-3]!=3:
            with pytest.raises(ValueError, match='statistics for 3 channels do not fit'): norm(bad)

# ---- seeds and settings that look harmless ----

def test_large_seeds_are_not_other_epochs_of_small_ones():
    "NumPy's SeedSequence cuts a whole number of more than 32 bits into pieces; (42 + 2**32, 0) would be (42, 1)"
    orders = [torch.cat(list(DataLoader(list(range(50)), shuffle=True, seed=s))).tolist() for s in (42, 42 + 2**32, 42 + 2**64)]
    dl = DataLoader(list(range(50)), shuffle=True, seed=42)
    orders += [torch.cat(list(dl)).tolist() for _ in range(3)][1:]
    assert len(set(map(tuple, orders))) == 5
    assert len({_mix(a, b) for a in (0, 1, 2**32, 2**32 + 1, 2**33) for b in (0, 1, 2, 2**32)}) == 20

@pytest.mark.parametrize('name', ['shuffle', 'drop_last'])
def test_text_is_not_true(name):
    "'False' from a file of settings would count as True"
    with pytest.raises(TypeError, match=f"{name} is the text 'False'"): DataLoader([1, 2], **{name: 'False'})
    dl = DataLoader([1, 2])
    setattr(dl, name, 'no')
    with pytest.raises(TypeError, match=name): list(dl)
    for value in (np.bool_(True), 1, None): DataLoader([1, 2], **{name: value})
