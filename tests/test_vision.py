"Images from files: all kinds and sizes, broken ones, worker processes; and networks equal to PyTorch's"
import pickle
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from PIL import Image, ImageOps
from torch import nn

from course_lib import vision
from course_lib.dataloader import BatchError, DataLoader, DataLoaders
from course_lib.datasets import get_image_files, stack_images
from course_lib.vision import *

def smooth(rng, h, w):
    "A random picture without sharp edges, (h, w, 3) uint8"
    im = Image.fromarray(rng.integers(0, 256, (4,4,3), dtype=np.uint8))
    return np.asarray(im.resize((w,h), Image.BICUBIC))

def save(folder, name, a, mode='RGB', **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).convert(mode).save(folder/name, **kwargs)
    return folder/name

# ---- files

@pytest.mark.parametrize('mode,suffix', [('RGB','png'), ('L','png'), ('RGBA','png'), ('P','png'), ('1','png'), ('LA','png'),
                                         ('RGB','jpg'), ('L','jpg'), ('CMYK','jpg')])
@pytest.mark.parametrize('want', ['RGB', 'L'])
def test_every_kind_of_file_becomes_the_same_kind_of_tensor(tmp_path, mode, suffix, want):
    f = save(tmp_path/'a', f'x.{suffix}', smooth(np.random.default_rng(0), 50, 70), mode)
    x,y = ImageDataset([f], size=32, mode=want)[0]
    assert x.shape==((3 if want=='RGB' else 1), 32, 32) and x.dtype==torch.float32 and y==0
    assert 0<=x.min() and x.max()<=1 and x.std()>0.02
    b,_ = ImageDataset([f], size=32, mode=want, dtype=torch.uint8)[0]
    assert b.dtype==torch.uint8
    torch.testing.assert_close(b.float()/255, x)

some = settings(max_examples=50, deadline=None, derandomize=True)     # the same examples each time, on a busy machine too
def sides(least): return st.integers(least, 700)

def whole(f, size):
    "The picture decoded in full and then resized, as numbers"
    with Image.open(f) as im: return np.asarray(im.convert('RGB').resize((size,size), Image.BILINEAR)).astype(int)

@some
@given(h=sides(40), w=sides(40), size=st.integers(8, 96), seed=st.integers(0, 99))
def test_reduced_decoding_is_near_full_decoding(tmp_path_factory, h, w, size, seed):
    """Both average the pixels around the same place, over windows of about `k`, the pixels that become one. Means over
    windows of other shapes differ by half the difference of their variances, at most k²/6, times the second derivative,
    of which f(x+k) - 2f(x) + f(x-k) is k² times an estimate: so by a twelfth of that along each axis, and by rounding.
    (Of 20,000 examples none came nearer to the bound than 0.69 of it.)"""
    f = save(tmp_path_factory.mktemp('jpg'), 'x.jpg', smooth(np.random.default_rng(seed), h, w), quality=90)
    with Image.open(f) as im: a = np.asarray(im).astype(float)
    bound = 1.
    for axis,n in enumerate((h, w)):
        k = max(1, round(n/size))
        if n>2*k: bound += np.abs(a.take(range(2*k, n), axis) - 2*a.take(range(k, n-k), axis) + a.take(range(n-2*k), axis)).mean()/12
    ours = np.asarray(load_image(f, size)).astype(int)
    assert ours.shape==(size,size,3) and abs(whole(f, size)-ours).mean()<bound

@some
@example(h=64, w=89, size=8, across=True)       # eleven blocks and one column: 16 off if the column counts as a block
@given(h=sides(32), w=sides(32), size=st.integers(4, 96), across=st.booleans())
def test_reduced_decoding_does_not_stretch(tmp_path_factory, h, w, size, across):
    """A ramp has no second derivative: whatever the windows are, the means agree, if they are means around the same places.
    Only the outermost windows end at the border, by which the mean of a triangle moves inward by a tenth of its height."""
    ramp = np.linspace(0, 255, w if across else h).round().astype(np.uint8)
    ramp = np.broadcast_to(ramp[None,:,None] if across else ramp[:,None,None], (h,w,3))
    f = save(tmp_path_factory.mktemp('jpg'), 'x.jpg', ramp, quality=95)
    gap = abs(whole(f, size) - np.asarray(load_image(f, size)))
    assert gap[1:-1,1:-1].max()<=6 and gap.max()<=6 + 0.1*255/size      # JPEG rounds away 4, in 45,000 examples; another decoder more

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_reduced_decoding_respects_orientation(tmp_path, orientation, mode):
    a = smooth(np.random.default_rng(1), 333, 517)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, 'x.jpg', a, mode, quality=95, exif=exif)
    with Image.open(tmp_path/'x.jpg') as im: upright = ImageOps.exif_transpose(im).convert('RGB')
    assert load_image(tmp_path/'x.jpg').size==upright.size==((517,333) if orientation<5 else (333,517))
    assert np.array_equal(load_image(tmp_path/'x.jpg'), upright)
    want = np.asarray(upright.resize((40,40), Image.BILINEAR)).astype(int)
    assert abs(np.asarray(load_image(tmp_path/'x.jpg', 40)) - want).max()<12
    turned = [abs(np.rot90(want, k) - want).mean() for k in (1,2,3)] + [abs(want[::-1] - want).mean(), abs(want[:,::-1] - want).mean()]
    assert min(turned)>20       # or it could not be told

def odd_files(folder):
    "The same picture in many kinds of files"
    gray = smooth(np.random.default_rng(0), 24, 24)[...,0].copy()
    im,exif = Image.fromarray(gray),Image.Exif()
    exif[0x0112] = 6
    folder.mkdir(exist_ok=True)
    for name,o,kw in [('L.png', im, {}), ('RGB.bmp', im.convert('RGB'), {}), ('P.png', im.quantize(256), {}), ('P.gif', im, {}),
            ('RGBA.png', im.convert('RGBA'), {}), ('LA.png', im.convert('LA'), {}), ('L.tif', im, {}), ('L.webp', im.convert('RGB'), dict(lossless=True)),
            ('16.png', Image.fromarray(gray.astype(np.uint16)*257), {}), ('16.tif', Image.fromarray(gray.astype(np.uint16)*257), {}),
            ('exif.png', im.rotate(90), dict(exif=exif)), ('exif.tif', im.rotate(90), dict(exif=exif))]: o.save(folder/name, **kw)
    return gray,get_image_files(folder)

def test_every_reader_sees_the_same_picture(tmp_path):
    "One place opens images: stack_images, load_image and ImageDataset agree on every kind of file"
    gray,files = odd_files(tmp_path/'a')
    assert len(files)==12
    want = torch.from_numpy(gray)/255
    torch.testing.assert_close(stack_images(files), want.expand(12,-1,-1), atol=0, rtol=0)
    for mode in ('L', 'RGB'):
        for f in files: assert np.array_equal(np.asarray(load_image(f, mode=mode)), gray if mode=='L' else gray[...,None].repeat(3, 2)), f
        for x,_ in ImageDataset(files, size=24, mode=mode): torch.testing.assert_close(x, want.expand(x.shape[0],-1,-1), atol=1e-7, rtol=0)

def test_32_bits_are_refused_by_name(tmp_path):
    (tmp_path/'a').mkdir()
    Image.fromarray(np.zeros((4,4), np.float32)).save(tmp_path/'a'/'x.tif')
    with pytest.raises(ImageError, match=r'x\.tif cannot be read.*32 bits'): ImageDataset([tmp_path/'a'/'x.tif'])[0]

def test_pixels_keep_their_places_and_channels(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (16,16,3), dtype=np.uint8)
    x,_ = ImageDataset([save(tmp_path/'a', 'x.png', a)], size=16)[0]
    for c in range(3):
        for i,j in [(0,0), (3,11), (15,2)]: assert round(x[c,i,j].item()*255)==a[i,j,c]

def test_labels_and_classes(tmp_path):
    files = [Path(o) for o in ('train/b/1.png', 'train/a/1.png', 'val/b/2.png')]
    train,valid = split_files(files)
    ds = ImageDataset(train)
    assert ds.classes==['a','b'] and ds.y.tolist()==[1,0] and ds.y.dtype==torch.int64
    assert ImageDataset(valid, ds.classes).y.tolist()==[1]
    assert ImageDataset(train, ['b','a']).y.tolist()==[0,1]
    assert ImageDataset(train, label=lambda f: f.parent.parent.name).classes==['train']
    with pytest.raises(ValueError, match="label 'b', and the classes are 'a'"): ImageDataset(train, ['a'])
    with pytest.raises(ValueError, match="of 'x', but train, val, valid are known"): split_files(['x/a/1.png'])
    assert split_files(['x/a/1.png'], train='x')==([Path('x/a/1.png')], [])

def test_loaders_of_folders_that_lack_a_class_are_refused_until_both_go_by_one_list(tmp_path):
    a = np.zeros((4,4), np.uint8)
    for o in ('train/a', 'train/b', 'train/c', 'valid/a', 'valid/c'): save(tmp_path/o, '0.png', a)
    train,valid = split_files(get_image_files(tmp_path))
    ds = ImageDataset(train, size=4)
    with pytest.raises(ValueError, match='the classes are a, b, c for training, and a, c for validation'): DataLoaders.from_datasets(ds, ImageDataset(valid, size=4))
    dls = DataLoaders.from_datasets(ds, ImageDataset(valid, ds.classes, size=4))
    assert dls.c==3 and next(iter(dls.valid))[1].tolist()==[0, 2]

def test_accents_are_one_letter():
    "macOS writes é as e and an accent; a file system keeps what it was given"
    train,valid = [Path('train/\u00e9/1.png'), Path('train/f/1.png')],[Path('valid/e\u0301/1.png')]
    ds = ImageDataset(train)
    assert ds.classes==['f', '\u00e9'] and ImageDataset(valid, ds.classes).y.tolist()==[1]
    assert ImageDataset(train + valid).classes==ds.classes

def test_classes_twice_are_refused():
    with pytest.raises(ValueError, match='occurs twice'): ImageDataset([Path('a/1.png')], ['a', 'b', 'a'])

@pytest.mark.parametrize('number', [np.int64, np.uint8, np.float64, float, torch.tensor])
def test_numbers_of_any_make(tmp_path, number):
    files = [save(tmp_path/'a', f'{i}.jpg', smooth(np.random.default_rng(i), 50, 70)) for i in range(3)]
    want = ImageDataset(files, size=16)[2]
    if number in (np.float64, float):
        with pytest.raises(ValueError, match='size is .*16.0.*, but a whole number'): ImageDataset(files, size=number(16))
        return
    x,y = ImageDataset(files, size=number(16))[number(2)]
    assert torch.equal(x, want[0]) and y==want[1]
    assert resnet18(number(3), number(10), nf=number(32))(torch.zeros(2,3,32,32)).shape==(2,10)     # 8*32 is no uint8
    assert simple_cnn(number(3), number(10))(torch.zeros(2,3,32,32)).shape==(2,10)

@pytest.mark.parametrize('i,error', [(slice(1), TypeError), ([0], TypeError), (0.5, TypeError), (None, TypeError), (1, IndexError), (-2, IndexError)], ids=str)
def test_a_number_that_is_none_is_not_the_fault_of_the_file(tmp_path, i, error):
    ds = ImageDataset([save(tmp_path/'a', '0.png', np.zeros((4,4), np.uint8))], size=4)
    with pytest.raises(error): ds[i]
    assert torch.equal(ds[-1][0], ds[0][0]) and len(list(ds))==1

@pytest.mark.parametrize('bad', [dict(size=0), dict(size=-1), dict(size=True), dict(size='64'), dict(size=None), dict(mode='rgb'), dict(mode='RGBA'), dict(mode=None),
                                 dict(dtype=torch.int64), dict(dtype=torch.bool), dict(dtype=np.float32)], ids=str)
def test_what_makes_no_dataset_is_refused_at_once(bad):
    with pytest.raises(ValueError, match='ImageDataset: .*wanted'): ImageDataset([Path('a/1.png')], **bad)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_floats(tmp_path, dtype):
    f = save(tmp_path/'a', 'x.png', smooth(np.random.default_rng(0), 20, 20))
    x,want = ImageDataset([f], dtype=dtype)[0][0],ImageDataset([f])[0][0]
    assert x.dtype==dtype and (x.float() - want).abs().max()<0.01

@pytest.mark.parametrize('one', ['train/a/1.png', Path('train/a'), 'train'], ids=str)
def test_one_name_is_not_a_list_of_files(one):
    "A text would be taken apart, letter by letter"
    for f in ImageDataset, split_files:
        with pytest.raises(TypeError, match=f'{f.__name__}: got .*a list of image files is wanted.*get_image_files'): f(one)

@pytest.mark.parametrize('bad', [dict(size=0), dict(size=True), dict(size=8.5), dict(size=(8,8)), dict(mode='CMYK'), dict(mode='rgb')], ids=str)
@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_load_image_refuses_what_is_no_size_or_mode(tmp_path, bad, suffix):
    "0 gave the whole picture, True one pixel, and CMYK four channels of ink"
    f = save(tmp_path, f'x.{suffix}', smooth(np.random.default_rng(0), 20, 20))
    with pytest.raises(ValueError, match='load_image: .*wanted'): load_image(f, **bad)

@pytest.mark.parametrize('mode', ['P', 'RGBA', '1', 'I', 'F', 'LA', 'CMYK'])
def test_image_bytes_takes_gray_and_rgb_alone(mode):
    "The numbers of a palette are no brightness"
    im = Image.fromarray(smooth(np.random.default_rng(0), 20, 20))
    with pytest.raises(ValueError, match=f'image_bytes: the image is of mode {mode},.*convert_image'): image_bytes(im.convert(mode))
    assert image_bytes(im).shape==(3,20,20) and image_bytes(im.convert('L')).shape==(1,20,20)

def test_labels_stay_on_the_cpu():
    "Also where somebody has made another device the default"
    torch.set_default_device('meta')
    try: ds = ImageDataset([Path('a/1.png')])
    finally: torch.set_default_device(None)
    assert ds.y.device.type=='cpu' and ds.y.tolist()==[0]

# ---- broken files and workers

@pytest.mark.parametrize('content', [b'', b'not an image', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0'])
@pytest.mark.parametrize('n_workers', [0, 1])
def test_a_broken_file_is_named(tmp_path, content, n_workers):
    a = smooth(np.random.default_rng(0), 20, 20)
    files = [save(tmp_path/'a', f'{i}.png', a) for i in range(4)]
    files[2].write_bytes(content)
    dl = DataLoader(ImageDataset(files, size=8), bs=2, n_workers=n_workers)
    with pytest.raises(BatchError, match=r'item 2 failed.*2\.png cannot be read as an image'): list(dl)

def test_truncated_jpeg_is_named(tmp_path):
    f = save(tmp_path/'a', 'x.jpg', smooth(np.random.default_rng(0), 200, 200))
    f.write_bytes(f.read_bytes()[:-800])
    with pytest.raises(ImageError, match=r'x\.jpg cannot be read'): ImageDataset([f])[0]

def test_workers_and_pickle_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    ds = ImageDataset([save(tmp_path/f'{i%3}', f'{i}.jpg', smooth(rng, 30+i, 40)) for i in range(20)], size=16)
    here = list(DataLoader(ds, bs=6, shuffle=True, seed=1))
    there = list(DataLoader(pickle.loads(pickle.dumps(ds)), bs=6, shuffle=True, seed=1, n_workers=2))
    assert len(here)==len(there)==4
    for (x,y),(x2,y2) in zip(here, there): assert torch.equal(x, x2) and torch.equal(y, y2)

def test_no_file_stays_open(tmp_path, recwarn):
    ds = ImageDataset([save(tmp_path/'a', 'x.png', smooth(np.random.default_rng(0), 20, 20))], size=8)
    for _ in range(3): ds[0]
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]

# ---- which data

def test_imagenette_only_if_there_or_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(vision, 'get_data', lambda name: asked.append(name) or tmp_path)
    monkeypatch.setenv('COURSE_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('COURSE_IMAGENETTE', raising=False)
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    assert imagenette_or_fashion()[1].startswith('Fashion') and asked==['fashion_files']
    monkeypatch.setenv('COURSE_IMAGENETTE', '1')
    assert imagenette_or_fashion()[1].startswith('Imagenette') and asked[1:]==['imagenette_160']
    monkeypatch.delenv('COURSE_IMAGENETTE')
    there = tmp_path/'data'/'imagenette2-160'
    for o in ('train','val'): (there/o).mkdir(parents=True)
    assert imagenette_or_fashion()==(there, 'Imagenette, photos at 160 pixels') and len(asked)==2

# ---- networks

class Block(nn.Module):
    "The block of torchvision's resnet18, written down from the paper"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)
        self.conv2,self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False),nn.BatchNorm2d(nf)
        if ni!=nf or stride!=1:
            self.downsample = nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
    def forward(self, x):
        skip = self.downsample(x) if hasattr(self, 'downsample') else x
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + skip).relu()

def torch_resnet18(n_in, n_out, nf):
    return nn.Sequential(nn.Conv2d(n_in, nf, 7, 2, 3, bias=False), nn.BatchNorm2d(nf), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Block(nf, nf, 1), Block(nf, nf, 1), Block(nf, nf*2, 2), Block(nf*2, nf*2, 1), Block(nf*2, nf*4, 2),
        Block(nf*4, nf*4, 1), Block(nf*4, nf*8, 2), Block(nf*8, nf*8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(nf*8, n_out))

def torch_simple(n_in, n_out):
    nfs = [n_in, 16, 32, 64, 128]
    convs = [o for a,b in zip(nfs, nfs[1:]) for o in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_out))

@pytest.mark.parametrize('ours,theirs,size', [
    (lambda: resnet18(3, 10, 16), lambda: torch_resnet18(3, 10, 16), 64),
    (lambda: resnet18(1, 2, 8), lambda: torch_resnet18(1, 2, 8), 28),
    (lambda: simple_cnn(3, 10), lambda: torch_simple(3, 10), 64)])
def test_networks_equal_pytorch(ours, theirs, size):
    torch.manual_seed(0)
    a,b = ours().to(torch.float64),theirs().double()
    assert [tuple(o.shape) for o in a.state_dict().values()]==[tuple(o.shape) for o in b.state_dict().values()]
    a.load_state_dict(dict(zip(a.state_dict(), b.state_dict().values())))      # the same order, so weights can be taken over
    x,y = torch.randn(4, next(a.parameters()).shape[1], size, size).double(),torch.tensor([0, 1, 1, 0])
    for training in (True, False):
        a.train(training); b.train(training)
        a.zero_grad(); b.zero_grad()
        pa,pb = a(x),b(x)
        torch.testing.assert_close(pa, pb)
        F.cross_entropy(pa, y).backward(); F.cross_entropy(pb, y).backward()
        for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad)

def test_counts():
    net = resnet18()
    assert sum(p.numel() for p in net.parameters())==sum(p.numel() for p in torch_resnet18(3, 1000, 64).parameters())==11_689_512
    assert len(list(net.parameters()))==62
    assert len(list(simple_cnn().parameters()))==10 and len(list(simple_cnn(norm=True).parameters()))==14
