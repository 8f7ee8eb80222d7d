#!/bin/sh
# mmdebstrap customize hook: turns the installed packages into a machine that
# boots, grows, takes cloud-init's word and holds no identity of its own.
set -eu
root=$1
in_root() { chroot "$root" "$@"; }
put() { mkdir -p "$(dirname "$root$1")"; cat >"$root$1"; }

# --- identity: none
: >"$root/etc/machine-id"
rm -f "$root"/etc/ssh/ssh_host_*_key "$root"/etc/ssh/ssh_host_*_key.pub \
    "$root/etc/hostname" "$root/var/lib/dbus/machine-id" \
    "$root/var/lib/systemd/random-seed" "$root/var/lib/systemd/credential.secret"
put /etc/hosts <<'E'
127.0.0.1	localhost
::1		localhost ip6-localhost ip6-loopback
ff02::1		ip6-allnodes
ff02::2		ip6-allrouters
E

# --- disk
put /etc/fstab <<E
UUID=$KILN_ROOT_UUID	/	ext4	rw,errors=remount-ro,x-systemd.growfs	0	1
UUID=$KILN_ESP_UUID	/boot/efi	vfat	umask=0077,noauto	0	0
E
mkdir -p "$root/boot/efi"
# The root partition is the last one. When the disk has grown, this grows it
# at boot, then x-systemd.growfs the file system, with or without cloud-init.
# (systemd-repart would do, but takes seconds at every boot under emulation.)
put /usr/lib/kiln/grow-root <<'E'
#!/bin/sh
set -eu
part=/sys/dev/block/$(mountpoint -d /)
[ -e "$part/partition" ] || exit 0
read -r number <"$part/partition"
read -r start <"$part/start"
read -r size <"$part/size"
read -r disk <"$part/../size"
# In sectors; what is less than 2 MiB is alignment and the second GPT.
[ $((disk - start - size)) -gt 4096 ] || exit 0
name=$(sed -n 's/^DEVNAME=//p' "$part/../uevent")
echo ', +' | sfdisk -q --no-reread --no-tell-kernel --force -N "$number" "/dev/$name"
exec partx --update --nr "$number" "/dev/$name"
E
chmod 755 "$root/usr/lib/kiln/grow-root"
put /etc/systemd/system/kiln-grow-root.service <<'E'
[Unit]
Description=Grow the root partition to the end of its disk
DefaultDependencies=no
ConditionPathIsReadWrite=/
After=systemd-remount-fs.service
Before=systemd-growfs@-.service systemd-growfs-root.service local-fs.target shutdown.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/kiln/grow-root

[Install]
WantedBy=local-fs.target
E
in_root systemctl -q enable kiln-grow-root.service

# --- network: DHCP on whatever Ethernet there is, unless cloud-init says more
put /etc/systemd/network/90-dhcp.network <<'E'
[Match]
Name=en* eth*

[Network]
DHCP=yes
LLMNR=no
MulticastDNS=no

[DHCPv4]
# Clones made from one image differ by their MAC address only.
ClientIdentifier=mac
E
in_root systemctl -q enable systemd-networkd.service systemd-resolved.service systemd-timesyncd.service
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# --- ssh
put /etc/ssh/sshd_config.d/60-no-passwords.conf <<'E'
PasswordAuthentication no
KbdInteractiveAuthentication no
E
put /etc/systemd/system/kiln-ssh-host-keys.service <<'E'
[Unit]
Description=Make the SSH host keys this machine does not have yet
Documentation=man:ssh-keygen(1)
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
# While kiln bakes, sshd shows a key of that bake alone, kept in memory.
ConditionPathExists=!/run/kiln/ssh_host_ed25519_key
After=cloud-init.service
Before=ssh.service ssh.socket

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=ssh.service ssh.socket
E
in_root systemctl -q enable kiln-ssh-host-keys.service

# --- cloud-init: keep the image's package sources and locale
put /etc/cloud/cloud.cfg.d/20_kiln.cfg <<'E'
apt:
  preserve_sources_list: true
locale: false
E
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"

# --- less to do at boot
# No LVM snapshots to reap, no crash dumps of firmware.
in_root systemctl -q disable e2scrub_reap.service e2scrub_all.timer systemd-pstore.service || true
# Loads three modules even when it has nothing to do; kiln-grow-root does its work.
ln -sf /dev/null "$root/etc/systemd/system/systemd-repart.service"
# While kiln bakes, its sessions need no service manager of their own: seconds
# at each login under emulation.
put /etc/systemd/system/user@0.service.d/kiln.conf <<'E'
[Unit]
ConditionPathExists=!/run/kiln/authorized_keys
E

# --- boot loader
cmdline='console=tty0 console=ttyS0,115200n8'
mkdir -p "$root/etc/default/grub.d" "$root/boot/grub" "$root/boot/kiln"
put /etc/default/grub <<E
# After a change: update-grub
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT="quiet"
GRUB_CMDLINE_LINUX="$cmdline"
GRUB_TERMINAL="console serial"
GRUB_SERIAL_COMMAND="serial --unit=0 --speed=115200"
GRUB_DISABLE_OS_PROBER=true
E
# The first one: update-grub needs the real disk and replaces it in the guest.
put /boot/grub/grub.cfg <<E
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set default=0
set timeout=0
menuentry 'Debian GNU/Linux' {
	search --no-floppy --fs-uuid --set=root $KILN_ROOT_UUID
	linux /vmlinuz root=UUID=$KILN_ROOT_UUID ro $cmdline quiet
	initrd /initrd.img
}
E
cat >"$root/boot/kiln/early.cfg" <<E
search.fs_uuid $KILN_ROOT_UUID root hd0,gpt3
set prefix=(\$root)/boot/grub
E
# All that a generated grub.cfg loads: no module is read from the disk, so that
# one from a later grub package never meets this core.
modules="part_gpt part_msdos ext2 fat normal configfile search search_fs_uuid search_label
 linux echo test true regexp sleep reboot halt minicmd ls cat help serial terminal terminfo
 gzio xzio zstd loadenv probe all_video video gfxterm gettext font loopback keystatus boot"
in_root grub-mkimage -O i386-pc -p /boot/grub -c /boot/kiln/early.cfg \
    -o /boot/kiln/core.img $modules biosdisk
in_root grub-mkimage -O x86_64-efi -p /boot/grub -c /boot/kiln/early.cfg \
    -o /boot/kiln/BOOTX64.EFI $modules efi_gop efi_uga efifwsetup chain
cp "$root/usr/lib/grub/i386-pc/boot.img" "$root/boot/kiln/"
rm "$root/boot/kiln/early.cfg"

# --- what was for the build alone
cp "$KILN_WORK/sources.list" "$root/etc/apt/sources.list"
rm -f "$root/etc/apt/apt.conf.d/99kiln-site" "$root/etc/apt/apt.conf.d/99mmdebstrap" \
    "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
rm -rf "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/cache/man \
    "$root"/etc/passwd- "$root"/etc/shadow- "$root"/etc/group- "$root"/etc/gshadow- \
    "$root"/etc/subuid- "$root"/etc/subgid- "$root"/var/log/*.log "$root"/var/log/apt/* "$root/etc/.pwd.lock"
