# Makes the root file system as large as its disk. Run in the guest by POSIX sh,
# by root. The partition was grown before the start where kiln understood the
# table; this does the rest. Says what it did; fails only when it tried and could not.
set -u
source=$(findmnt -nro SOURCE / 2>/dev/null) || source=
kind=$(findmnt -nro FSTYPE / 2>/dev/null) || kind=
source=${source%%\[*}                       # btrfs: /dev/vda1[/subvolume]
[ -n "$source" ] && [ -b "$source" ] || { echo "the root is on ${source:-something unknown}: left alone"; exit 0; }
device=$(readlink -f "$source")
name=${device##*/}

# The partition: grown if a mebibyte or more is free behind it.
if [ -r "/sys/class/block/$name/partition" ]; then
    number=$(cat "/sys/class/block/$name/partition")
    disk=$(basename "$(readlink -f "/sys/class/block/$name/..")")
    end=$(( $(cat "/sys/class/block/$name/start") + $(cat "/sys/class/block/$name/size") ))
    size=$(cat "/sys/class/block/$disk/size")
    # 34 sectors are the backup table, and partitions end on whole mebibytes.
    if [ $(( size - end )) -ge 4130 ]; then
        next=$(for p in "/sys/class/block/$disk/$disk"*; do
            [ -r "$p/start" ] && [ "$(cat "$p/start")" -ge "$end" ] && echo "${p##*/}"
        done)
        if [ -n "$next" ]; then
            echo "the partition $name is not the last one: left alone"
        elif command -v growpart >/dev/null 2>&1; then
            growpart "/dev/$disk" "$number" || [ $? -eq 1 ] || exit 1
        elif command -v sfdisk >/dev/null 2>&1; then
            echo ', +' | sfdisk -q --force --no-reread -N "$number" "/dev/$disk" || exit 1
            partx -u "/dev/$disk" || partprobe "/dev/$disk" || exit 1
        else
            echo "neither growpart nor sfdisk is there to grow the partition $name" >&2
            exit 1
        fi
    fi
fi

case $kind in
    ext2|ext3|ext4) resize2fs "$device" 2>&1 ;;
    xfs) xfs_growfs / 2>&1 ;;
    btrfs) btrfs filesystem resize max / 2>&1 ;;
    *) echo "a root of type ${kind:-unknown} is left alone" ;;
esac
