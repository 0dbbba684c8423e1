#!/bin/busybox sh
# The first process of the test guest. It loads the modules, then obeys the second serial port: one line is one command for
# the shell; the answer is a line `exit CODE LENGTH` and then LENGTH bytes of output. `ready` is said once at the start.
# Everything that goes wrong before that is on the first serial port. The power button powers off.
# With `watch` on the kernel's command line there is no second port: the disks are told on the first one as they change.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /root /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/modules/$module" || echo "init: $module did not load"
done </modules/order
for button in /dev/input/event*; do
    (dd if="$button" bs=24 count=1 of=/dev/null 2>/dev/null && sync && poweroff -f) &
done
if grep -qw watch /proc/cmdline; then
    while true; do
        disks=$(echo /sys/block/vd*)
        [ "$disks" = "$told" ] || echo "UNIBODY-GUEST OK disks $disks"
        told=$disks
        sleep 1
    done
fi
exec 3<>/dev/ttyS1
stty raw -echo <&3
echo ready >&3
while IFS= read -r line <&3; do
    sh -c "$line" </dev/null >/tmp/answer 2>&1
    code=$?
    printf 'exit %d %d\n' "$code" "$(stat -c %s /tmp/answer)" >&3
    cat /tmp/answer >&3
done
echo 'init: the command port closed'
poweroff -f
