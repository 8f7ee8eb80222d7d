//! What `kiln init` writes.

/// A first `kiln.toml`: commented, and baking as it stands.
pub const INIT_TEMPLATE: &str = r##"# A machine image with a web server and one page.
#
#   kiln validate    finds every mistake in this file
#   kiln bake        bakes it; a second bake does only what has changed
#   kiln run hello   boots it on a throwaway copy

[image]
name = "hello"
version = "0.1.0"
# In a git repository, leave `version` out: it is then told from the newest tag.
# version = "{{ git.describe }}"
labels = { purpose = "first image" }

# What to start from: exactly one of debian, image, url and file.
[base]
debian = "bookworm"
# image = "debian-base:12"
# url = "https://example.org/disk.qcow2"    # and checksum = "sha256:…"
# file = "disk.qcow2"

[disk]
size = "4GiB"

# Values to use below as {{ var.NAME }}. Change one for a single bake with
#   kiln bake --var greeting="Good morning"
[variables]
greeting = "Hello from kiln"
# One that is never shown, stored or logged:
# token = { env = "API_TOKEN", sensitive = true }

# The machine that the image is baked on. The image does not depend on it.
[builder.qemu]
memory = "1GiB"
cpus = 2

# The steps, in order. Scripts are bash, run as root, and end at the first
# command that fails. They are taken as they stand: a value enters by `env`.
[[provision]]
name = "packages"
shell = '''
apt-get update
apt-get install -y --no-install-recommends nginx-light curl
'''

[[provision]]
name = "page"
env = { GREETING = "{{ var.greeting }}" }
shell = '''
cat > /var/www/html/index.html <<PAGE
<!doctype html>
<title>hello</title>
<h1>$GREETING</h1>
PAGE
'''

# A file or a whole folder from beside this file:
# [[provision]]
# name = "site"
# file = { source = "site/", destination = "/var/www/html" }

# Tests run on the finished image, on a throwaway copy of it.
[[test]]
name = "the page is served"
env = { GREETING = "{{ var.greeting }}" }
shell = '''
page=$(curl -fsS --retry 10 --retry-connrefused http://localhost)
grep -qF "$GREETING" <<<"$page"
'''
"##;
