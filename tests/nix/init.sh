#!/bin/sh
# What stage 2 of NixOS does, as far as a container of these tests needs it: make /run/current-system and /etc, and
# become systemd. Which of systemd's own units there are is decided here, not by the /usr that they come from.
set -eu
export PATH=/usr/bin

system=$(dirname "$(readlink -f "$0")")
ln -sfn "$system" /run/current-system
ln -sfn /run /var/run
printf '%s:/:/bin/sh\n' root:x:0:0:root nobody:x:65534:65534:nobody messagebus:x:100:100:messagebus > /etc/passwd
printf '%s:\n' root:x:0 nogroup:x:65534 messagebus:x:100 systemd-journal:x:101 > /etc/group

units=/run/systemd/units-of-the-system
mkdir -p $units
cp -rP "$system"/etc/systemd/system/. $units
for unit in \
  sysinit basic sockets paths timers slices local-fs network multi-user \
  shutdown umount final exit halt poweroff reboot
do
  ln -s /usr/lib/systemd/system/$unit.target $units
done
for unit in systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket \
  dbus.service dbus.socket systemd-exit.service systemd-halt.service systemd-poweroff.service systemd-reboot.service
do
  ln -s /usr/lib/systemd/system/$unit $units
done
mkdir $units/sockets.target.wants
for unit in dbus systemd-journald systemd-journald-dev-log; do ln -s ../$unit.socket $units/sockets.target.wants; done
ln -s multi-user.target $units/default.target

SYSTEMD_UNIT_PATH=$units exec /usr/lib/systemd/systemd
