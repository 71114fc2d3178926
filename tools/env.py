"""Make .venv with the pinned versions, once; later calls see that it is up to date and return at once.

With `--newest` it takes the newest versions that settings.ini allows, and leaves out nbdev: the pins are for its sake.

Written for any Python, however old, so that a too-old one gets a clear line and not a syntax error."""
import hashlib, os, re, shutil, subprocess, sys, sysconfig

OLDEST = (3, 11, 4)     # as in settings.ini
NEEDED_GB = 3
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, '.venv')
PY = os.path.join(VENV, 'Scripts', 'python.exe') if os.name == 'nt' else os.path.join(VENV, 'bin', 'python')
STAMP, LOG = os.path.join(VENV, 'installed'), os.path.join(ROOT, '.venv-install.log')

def stop(message):
    sys.exit('make: ' + message)

def fingerprint(newest):
    "What the installed versions depend on; a change in any of it means installing again"
    h = hashlib.sha256(repr((sys.version_info[:2], ROOT, newest)).encode())
    for name in 'settings.ini', 'constraints.txt', 'setup.py':
        with open(os.path.join(ROOT, name), 'rb') as f: h.update(f.read())
    return h.hexdigest()

def surroundings():
    "The environment for pip, without what would make it install into, or find packages in, another place than .venv"
    elsewhere = 'PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PYTHONPATH PYTHONHOME'.split()
    return dict({k: v for k,v in os.environ.items() if k not in elsewhere}, PIP_USER='0')

def run(*cmd):
    "Run `cmd` with its output in the log; returns its exit status and what it printed"
    with open(LOG, 'ab') as f:
        start = f.tell()
        rc = subprocess.call(cmd, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, env=surroundings())
    with open(LOG, 'rb') as f:
        f.seek(start)
        return rc, f.read().decode('utf-8', 'replace')

NO_NETWORK = ('NewConnectionError', 'ConnectTimeout', 'ReadTimeout', 'Read timed out', 'NameResolutionError', 'Max retries',
              'Temporary failure in name resolution', 'ProxyError', 'ConnectionResetError')
UNBUILT = (r'pyproject.toml based projects \(([^)]+)\)', r'Failed building wheel for ([\w.-]+)', r"Failed to build '([\w.-]+)'",
           r'(metadata-generation-failed)')
ANOTHER = 'Another Python may do: make run PYTHON=/path/to/python3'

def why(out):
    "One line that says why an installation failed, and what to do; the surest signs are looked for first"
    here = 'Python {0}.{1} on {2}'.format(sys.version_info[0], sys.version_info[1], sysconfig.get_platform())
    missing = re.search(r'(?:No matching distribution found for|user requested \(constraint\)) ([^\s;]+)', out)
    unbuilt = [m.group(1) for m in (re.search(o, out) for o in UNBUILT) if m]
    offline = any(o in out for o in NO_NETWORK)
    if 'No space left' in out or 'Errno 28' in out:
        return 'the disk is full. The course needs about {0} GB; free some and try again.'.format(NEEDED_GB)
    if 'ensurepip' in out:
        return 'this Python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv'
    if unbuilt:
        name = 'a package' if unbuilt[0].startswith('metadata') else unbuilt[0]
        return '{0} comes without a wheel for {1}, and building it here failed. {2}'.format(name, here, ANOTHER)
    if 'CERTIFICATE_VERIFY_FAILED' in out or 'confirming the ssl certificate' in out:
        return 'the certificate of the package index is not trusted here. If a proxy put in its own, name it in PIP_CERT.'
    if offline and not re.search(r'\(from versions: (?!none)', out):
        return 'cannot reach the Python package index. The first run needs a network; check it and try again.'
    if missing:
        return 'the package index has no {0} that fits settings.ini and {1}. {2}'.format(missing.group(1), here, ANOTHER)
    if 'ResolutionImpossible' in out:
        return 'the versions in settings.ini and constraints.txt contradict each other.'
    if 'Permission denied' in out or 'Errno 13' in out:
        return 'permission is missing to write here.'
    return 'installing the packages failed.'

def install(newest):
    from configparser import ConfigParser
    config = ConfigParser(delimiters=['='])
    config.read(os.path.join(ROOT, 'settings.ini'), encoding='utf-8')
    cfg = config['DEFAULT']
    free = shutil.disk_usage(ROOT).free/1e9
    if free < NEEDED_GB: stop('only {0:.1f} GB free on this disk; the course needs about {1} GB.'.format(free, NEEDED_GB))
    sys.stdout.write('Setting up .venv: once, about two minutes and 2 GB ...\n')
    sys.stdout.flush()
    if os.path.exists(LOG): os.remove(LOG)
    pip = [PY, '-m', 'pip', '--disable-pip-version-check', 'install', '--retries', '2']
    packages = cfg['requirements'].split() + cfg['dev_requirements'].split()
    if newest: packages = ['--upgrade'] + [p for p in packages if not p.startswith('nbdev')]
    else: packages += ['-c', 'constraints.txt']
    steps = [[sys.executable, '-m', 'venv', '--clear', VENV], pip + packages, pip + ['--no-deps', '--no-build-isolation', '-e', '.']]
    for step in steps:
        rc, out = run(*step)
        if rc: stop(why(out) + ' (Everything pip said: .venv-install.log)')
    with open(STAMP, 'w') as f: f.write(fingerprint(newest))
    os.remove(LOG)

def main():
    if sys.version_info < OLDEST:
        stop('Python {0} or newer is needed, and {1} is {2}. Name another: make run PYTHON=/path/to/python3'.format(
            '.'.join(map(str, OLDEST)), sys.executable, '.'.join(map(str, sys.version_info[:3]))))
    newest = '--newest' in sys.argv[1:]
    if os.path.exists(STAMP) and os.path.exists(PY):
        with open(STAMP) as f:
            if f.read() == fingerprint(newest): return
    try: install(newest)
    except (IOError, OSError) as e: stop(why(str(e)) + ' ({0})'.format(e))

if __name__ == '__main__': main()
