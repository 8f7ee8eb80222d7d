#!/bin/sh
# Runs as root of a mount and pid namespace (and, for an ordinary user, of a
# user namespace): makes the root directory with mmdebstrap, then writes it as
# an ext4 file system straight into the disk file.
#
# In: KILN_WORK (folder, absolute), KILN_DISK (file, absolute), KILN_SUITE,
# KILN_MIRROR (may be empty), KILN_INCLUDE, KILN_ROOT_UUID, KILN_ESP_UUID,
# KILN_ROOT_OFFSET (bytes), KILN_ROOT_SIZE (KiB).
# Out: the disk file; in KILN_WORK: boot.img, core.img, BOOTX64.EFI.
set -eu
exec >&2
umask 022
cd "$KILN_WORK"

# A merged /usr from the start, where mmdebstrap has the hook: else the package
# usrmerge does it and brings all of Perl. After setup.sh, since it already asks
# the mirror.
hooks=/usr/share/mmdebstrap/hooks/maybe-merged-usr
set --
[ ! -d "$hooks" ] || set -- --hook-dir="$hooks"

mmdebstrap --mode=root --format=directory --variant=minbase \
    --include="$KILN_INCLUDE" \
    --aptopt='APT::Install-Recommends "false"' \
    --aptopt='Acquire::Languages "none"' \
    --aptopt='Acquire::Retries "3"' \
    --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-include=/usr/share/locale/locale.alias' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --setup-hook='"$KILN_WORK/setup.sh" "$1"' "$@" \
    --customize-hook='"$KILN_WORK/customize.sh" "$1"' \
    "$KILN_SUITE" "$KILN_WORK/root"

echo 'I: writing the file system'
mv root/boot/kiln/* .
rmdir root/boot/kiln
# The disk file is new and sparse: its zeros need no writing, if this mke2fs
# (1.47) knows how to be told. Else it leaves them to the kernel.
prezeroed=assume_storage_prezeroed=1
mke2fs -n -q -F -E "$prezeroed" "$KILN_DISK" >/dev/null 2>&1 ||
    prezeroed=lazy_itable_init=1
MKE2FS_CONFIG=$KILN_WORK/mke2fs.conf mke2fs -q -F -t ext4 -L root -U "$KILN_ROOT_UUID" \
    -d root -E "offset=$KILN_ROOT_OFFSET,nodiscard,$prezeroed" "$KILN_DISK" "${KILN_ROOT_SIZE}k"
rm -rf --one-file-system root
