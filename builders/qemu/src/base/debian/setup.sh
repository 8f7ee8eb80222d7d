#!/bin/sh
# mmdebstrap's setup hook, before the first package: $1 is the root directory.
set -eu
root=$1
put() { mkdir -p "$(dirname "$root$1")"; cat >"$root$1"; }

# mmdebstrap may be older than the suite, and then leaves out its updates.
list=$root/etc/apt/sources.list
case "$KILN_SUITE" in
sid | unstable | testing | experimental | rc-buggy) ;;
*)
    if [ "$(grep -c '^deb ' "$list")" = 1 ]; then
        sed -E -i -e p -e 's|^(deb .*/debian)/? ([^ ]+) (.*)$|\1 \2-updates \3\n\1-security \2-security \3|' "$list"
    fi
    ;;
esac
# Site settings hold for the build alone: customize.sh takes them out again.
cp "$list" "$KILN_WORK/sources.list"
if [ -n "$KILN_MIRROR" ]; then
    mirror=${KILN_MIRROR%/}
    sed -E -i "s|https?://[^ ]*/debian/? |$mirror |" "$list"
    # A mirror has the security archive beside the main one, and so has a
    # snapshot of a certain time (…/debian/TIME). Else it stays Debian's own.
    security=$(printf '%s' "$mirror" | sed -E 's|/debian(/[^/]*)?$|/debian-security\1|')
    if [ "$security" != "$mirror" ]; then
        sed -E -i "s|https?://[^ ]*/debian-security/? |$security |" "$list"
    fi
fi
[ ! -s "$KILN_WORK/site.conf" ] || cp "$KILN_WORK/site.conf" "$root/etc/apt/apt.conf.d/99kiln-site"

# Before the kernel is unpacked, so that the initramfs is made once.
put /etc/initramfs-tools/conf.d/kiln <<'E'
# See ../hooks/kiln. Remove both and run update-initramfs -u for MODULES=most.
MODULES=list
# The root file system's fsck goes in even where the initramfs cannot see the disk.
FSTYPE=ext4
E
mkdir -p "$root/etc/initramfs-tools/hooks"
cp "$KILN_WORK/initramfs-hook" "$root/etc/initramfs-tools/hooks/kiln"
chmod 755 "$root/etc/initramfs-tools/hooks/kiln"

# Stays in the image, so that a kernel update leaves out the same.
{
    echo '# Parts of the kernel package that a server does not need (200 MB, and'
    echo '# seconds at boot). To have one: remove its line, then'
    echo '# apt-get install --reinstall linux-image-$(uname -r)'
    # A pattern, in which * also matches /: some suites have /usr/lib/modules.
    for part in sound net/bluetooth net/mac80211 net/wireless drivers/bluetooth \
        drivers/comedi drivers/gpu/drm/amd drivers/gpu/drm/i915 \
        drivers/gpu/drm/nouveau drivers/gpu/drm/radeon drivers/gpu/drm/xe \
        drivers/iio drivers/isdn drivers/media drivers/net/wireless drivers/staging; do
        echo "path-exclude=/*lib/modules/*/kernel/$part/*"
    done
    echo '# Runs .pyc files as programs, at the price of a service at every boot.'
    echo 'path-exclude=/usr/lib/binfmt.d/python3*'
} | put /etc/dpkg/dpkg.cfg.d/kiln
