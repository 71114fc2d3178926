"Laws of distances, and PixelSimilarity against NumPy in double precision, on data made up by hypothesis"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom

from course_lib.baseline import PixelSimilarity, compare_right, l1_norm, l2_norm, standard_error

norms = pytest.mark.parametrize('norm', [l1_norm, l2_norm])
seeds = st.integers(0, 2**32-1)
quick = settings(max_examples=40, deadline=None)

def images(seed, *shape):
    "Standard normal numbers"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

@norms
@quick
@given(seed=seeds, h=st.integers(1, 9), w=st.integers(1, 9), k=st.floats(-5, 5))
def test_norms_are_distances(norm, seed, h, w, k):
    a,b,c = images(seed, 3, h, w)
    eps = 1e-4
    assert norm(a, a) == 0
    assert norm(a, b) == norm(b, a) > 0
    assert norm(a, c) <= norm(a, b) + norm(b, c) + eps
    assert abs(norm(a+c, b+c) - norm(a, b)) < eps
    assert abs(norm(k*a, k*b) - abs(k)*norm(a, b)) < eps*max(1, abs(k))
    assert l2_norm(a, b) <= l1_norm(a, b) + eps
    assert l1_norm(a, b) <= (h*w)**0.5 * l2_norm(a, b) + eps

@norms
@quick
@given(seed=seeds, n=st.integers(0, 5), c=st.integers(1, 4))
def test_norms_broadcast(norm, seed, n, c):
    x,m = images(seed, n, 4, 3),images(seed+1, c, 4, 3)
    d = norm(x[:,None], m)
    assert d.shape == (n, c)
    assert all(torch.allclose(d[i,j], norm(x[i], m[j]), atol=1e-5) for i in range(n) for j in range(c))

def numpy_distances(x, y, z, metric, center):
    "Distances of `z` to the centers of the classes of `x`, slowly and in float64"
    x,y,z = (o.double().flatten(1).numpy() if o.ndim>1 else o.numpy() for o in (x, y, z))
    m = np.stack([getattr(np, center)(x[y==i], axis=0) for i in range(y.max()+1)])
    d = z[:,None] - m
    return np.abs(d).sum(2) if metric=='l1' else np.sqrt((d**2).sum(2))

@pytest.mark.parametrize('center', ['mean', 'median'])
@pytest.mark.parametrize('metric', ['l1', 'l2'])
@quick
@given(seed=seeds, c=st.integers(1, 6), extra=st.integers(0, 20), shape=st.sampled_from([(5,), (3,4), (1,6,6)]),
       dtype=st.sampled_from([torch.float32, torch.float64]), scale=st.sampled_from([1e-3, 1., 255.]))
def test_like_numpy(metric, center, seed, c, extra, shape, dtype, scale):
    x,z = scale*images(seed, c+extra, *shape).to(dtype),scale*images(seed+1, 7, *shape).to(dtype)
    y = torch.cat([torch.arange(c), torch.randint(c, (extra,), generator=torch.Generator().manual_seed(seed))])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    model = PixelSimilarity(metric, center).fit(x, y)
    wanted = torch.from_numpy(numpy_distances(x, y, z, metric, center))
    assert model.centers.shape == (c, *shape) and model.centers.dtype == dtype
    assert torch.allclose(model.distances(z).double(), wanted, rtol=1e-4, atol=2e-3*scale)
    chosen = wanted.gather(1, model.predict(z)[:,None])[:,0]         # a tie may go either way
    assert torch.allclose(chosen, wanted.amin(1), rtol=1e-4, atol=2e-3*scale)

@quick
@given(seed=seeds, metric=st.sampled_from(['l1', 'l2']), center=st.sampled_from(['mean', 'median']))
def test_order_and_numbering_do_not_matter(seed, metric, center):
    x,z,y = images(seed, 30, 4, 4),images(seed+1, 9, 4, 4),torch.arange(30)%3
    g = torch.Generator().manual_seed(seed)
    order,names = torch.randperm(30, generator=g),torch.randperm(3, generator=g)
    d = PixelSimilarity(metric, center).fit(x, y).distances(z)
    assert torch.allclose(PixelSimilarity(metric, center).fit(x[order], y[order]).distances(z), d, atol=1e-4)
    assert torch.allclose(PixelSimilarity(metric, center).fit(x, names[y]).distances(z)[:,names], d, atol=1e-4)

@pytest.mark.parametrize('metric', ['l1', 'l2'])
@pytest.mark.parametrize('center', ['mean', 'median'])
def test_makes_no_tensor_on_the_default_device(metric, center):
    "All work happens where the images are: a tensor made on another device would stop this with an error"
    x,z,y = images(0, 30, 4, 4),images(1, 9, 4, 4),torch.arange(30)%3
    wanted = PixelSimilarity(metric, center).fit(x, y)
    with torch.device('meta'):
        model = PixelSimilarity(metric, center).fit(x, y)
        assert torch.equal(model.distances(z), wanted.distances(z))
        assert torch.equal(model.predict(z), wanted.predict(z))
        assert model.accuracy(x, y) == wanted.accuracy(x, y)

@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.float32])
def test_labels_are_numbers_of_any_type(dtype):
    x,y = images(0, 30, 4, 4),torch.arange(30)%3
    model = PixelSimilarity().fit(x, y.to(dtype))
    assert torch.equal(model.centers, PixelSimilarity().fit(x, y).centers) and model.accuracy(x, y.to(dtype))==model.accuracy(x, y)

@pytest.mark.parametrize('y', [torch.arange(30)%3+1, torch.arange(30)%2*2, torch.arange(30)/30, torch.arange(30)-1, torch.zeros(30, 1), torch.zeros(29), torch.zeros(())])
def test_labels_without_an_order_of_classes_or_an_image_each_are_refused(y):
    with pytest.raises(ValueError, match='PixelSimilarity: the (labels are|images are .* and the labels)'): PixelSimilarity().fit(images(0, 30, 4, 4), y)

def test_median_of_a_class_larger_than_quantile_takes_everywhere():
    "torch.quantile refused more than 2**24 numbers until lately"
    x = images(0, 24_001, 700)
    center = PixelSimilarity('l1', center='median').fit(x, torch.zeros(len(x), dtype=torch.int64)).centers[0]
    assert np.array_equal(center[:9].numpy(), np.median(x[:,:9].numpy(), axis=0))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
@pytest.mark.parametrize('metric', ['l1', 'l2'])
def test_on_a_gpu(metric):
    x,z,y = images(0, 300, 28, 28),images(1, 90, 28, 28),torch.arange(300)%10
    on_cpu,on_gpu = PixelSimilarity(metric).fit(x, y),PixelSimilarity(metric).fit(x.cuda(), y.cuda())
    assert on_gpu.predict(z.cuda()).is_cuda
    assert torch.allclose(on_gpu.distances(z.cuda()).cpu(), on_cpu.distances(z), rtol=1e-3)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x,y = images(0, 30, 4, 4).to(dtype),torch.arange(30)%3
    model = PixelSimilarity().fit(x, y)
    assert model.centers.dtype == torch.float32
    assert torch.equal(model.predict(x), PixelSimilarity().fit(x.float(), y).predict(x.float()))

def test_images_equal_to_a_center_have_a_finite_distance_near_zero():
    x = images(0, 10, 28, 28).abs()
    model = PixelSimilarity('l2').fit(x, torch.arange(10))
    own = model.distances(x).diag()
    assert own.isfinite().all() and own.max() < 0.05
    assert model.predict(x).tolist() == list(range(10))

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('metric', ['l1', 'l2'])
def test_bad_pixels_are_named(metric, bad):
    x,y = images(0, 30, 4, 4),torch.arange(30)%3
    model = PixelSimilarity(metric).fit(x, y)
    x[20,1,1] = bad
    for f in (model.distances, model.predict):
        with pytest.raises(ValueError, match='image 20 '): f(x)
    with pytest.raises(ValueError, match='class 2 '): PixelSimilarity(metric).fit(x, y)

@quick
@given(counts=st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_standard_error_is_the_spread_of_a_binomial(counts):
    hits, n = counts
    acc = hits/n     # a share that counting can give: for acc = 1 - 1e-16, say, scipy's own spread is off by 15 %
    assert standard_error(acc, n) == pytest.approx(binom(n, acc).std()/n, rel=1e-6, abs=1e-12)
    assert standard_error(1-acc, n) == pytest.approx(standard_error(acc, n), rel=1e-6, abs=1e-9)
    assert standard_error(acc, 4*n) == pytest.approx(standard_error(acc, n)/2)

@pytest.mark.parametrize('acc,n', [(0.966, 2038), (0.82, 10_000), (0.5, 20)])
def test_standard_error_is_what_repeated_counting_shows(acc, n):
    accs = np.random.default_rng(0).binomial(n, acc, 20_000)/n
    assert standard_error(acc, n) == pytest.approx(accs.std(), rel=0.03)
    assert np.mean(np.abs(accs-acc) <= 2*standard_error(acc, n)) == pytest.approx(0.95, abs=0.03)

def test_standard_error_takes_numbers_of_any_kind():
    wanted = standard_error(0.75, 16)
    assert type(wanted) is float and wanted == 0.75**0.5/8
    for acc in (np.float32(0.75), np.array(0.75), torch.tensor(0.75)):
        for n in (np.int64(16), torch.tensor(16)): assert standard_error(acc, n) == wanted
    assert standard_error(1, 16) == standard_error(0, 16) == 0

@pytest.mark.parametrize('acc,n,says', [
    (96.6, 2038, 'acc is 96.6'), (-0.1, 9, 'acc is -0.1'), (float('nan'), 9, 'acc is nan'), (True, 9, 'acc is True'), ('0.9', 9, "acc is '0.9'"),
    (None, 9, 'acc is None'), (torch.ones(3), 9, 'acc is tensor'), (0.9, 0, 'n is 0'), (0.9, -5, 'n is -5'), (0.9, 2.5, 'n is 2.5'), (0.9, None, 'n is None'),
    (0.9, True, 'n is True'), (0.9, float('inf'), 'n is inf')])
def test_standard_error_refuses_what_is_no_accuracy(acc, n, says):
    with pytest.raises(ValueError, match='^standard_error: ') as e: standard_error(acc, n)
    assert says in str(e.value)

def test_compare_right_counts_and_judges(capsys):
    n = 1000
    a,b = torch.arange(n)<900,torch.arange(n)>=60            # 900 and 940 right
    assert compare_right(a, b) == (60, 100, 'apart')
    p,q = standard_error(0.9, n),standard_error(0.94, n)
    assert f'0.9000 and 0.9400: 0.0400 apart, two standard errors are {2*np.hypot(p, q):.4f}: apart' in capsys.readouterr().out
    assert compare_right(b, a) == (100, 60, 'apart')
    assert compare_right(a, a) == (0, 0, 'level')
    assert compare_right(a[:10], b[:10])[-1] == 'apart'      # 1 and 0.  Ten alike would be level:
    assert compare_right(a[100:110], b[100:110]) == (0, 0, 'level')

@pytest.mark.parametrize('b', [torch.ones(5), torch.ones(5, 1, dtype=torch.bool), torch.ones(4, dtype=torch.bool),
                               torch.tensor(True)])
def test_compare_right_refuses_what_would_broadcast(b):
    with pytest.raises(ValueError, match='^compare_right: got .*trues and falses'):
        compare_right(torch.ones(5, dtype=torch.bool), b)
    with pytest.raises(ValueError): compare_right(torch.ones(0, dtype=torch.bool), torch.ones(0, dtype=torch.bool))
