//! The process of a link: reads packets from the TUN device, and puts them back when they have crossed the link.
//!
//! One thread reads and decides, one thread for each direction sleeps until the next packet of that direction is to
//! leave. How late it was is kept: a table is worth nothing if the link was slower than it says.

use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio_tun::Tun;

use super::path::{Fate, Path, PathShape};
use super::{FAR, NEAR, RECEIVER, SENDER, TransferLinkArgs};
use crate::usage;

/// Of the TUN device, which exists within the namespace only.
const DEVICE: &str = "tandem-link";
/// Packets that wait to be read; the kernel drops more.
const DEVICE_QUEUE_PACKETS: &str = "10000";
/// Packets that are on the way in one direction. More are dropped, and told.
const NUM_PACKETS_MAX: usize = 1 << 16;
/// Later than this is counted as this late.
const LATE_MICROS_MAX: usize = 20_000;
/// A thread that waits for packets to leave sleeps so long at least, as much later than it should be a packet leaves. To
/// wake for each of some Gbit/s takes most of a core, and the two ends share theirs with the link.
const REST: Duration = Duration::from_micros(100);
/// Of an IPv4 header: where source and destination begin.
const SOURCE: usize = 12;
const DESTINATION: usize = 16;
const HEADER_BYTES: usize = 20;

/// A packet, and when it leaves.
type OnTheWay = (Instant, Vec<u8>);

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToSender,
    ToReceiver,
}

/// What became of the packets that entered.
#[derive(Default)]
struct Told {
    num_entered: u64,
    num_lost: u64,
    num_queue_full: u64,
    num_too_many: u64,
    /// The device did not take them back.
    num_unwritten: u64,
}

/// Runs the link until standard input ends.
///
/// # Errors
/// If there is no TUN device, or it cannot be set up.
pub fn run_link(args: &TransferLinkArgs) -> anyhow::Result<()> {
    let link = &args.link;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("start tokio")?;
    let device = {
        let _runtime = runtime.enter();
        let devices = Tun::builder().name(DEVICE).mtu(link.mtu.into()).build();
        let devices = devices.context("make a TUN device: /dev/net/tun must be there, and the right to use it")?;
        Arc::new(devices.into_iter().next().context("the device that was asked for is there")?)
    };
    set_up(link.mtu)?;
    println!("ready");
    std::io::stdout().flush().context("tell the process that measures")?;

    let shape = PathShape {
        delay: link.rtt.unwrap_or_default() / 2,
        loss: link.loss,
        bytes_per_second: link.bytes_per_second(),
        queue_bytes_max: link.queue_bytes,
    };
    let told = Arc::new(Mutex::new(Told::default()));
    // Of a short link a tenth of the way at most.
    let rest = if shape.delay.is_zero() { REST } else { REST.min(shape.delay / 10) };
    let paths = [Path::new(shape, link.link_seed), Path::new(shape, link.link_seed.wrapping_add(1))];
    let late: Late = Arc::new(Mutex::new(vec![0; LATE_MICROS_MAX + 1]));
    let senders = [(); 2].map(|()| {
        let (sender, receiver) = sync_channel(NUM_PACKETS_MAX);
        let (device, late, told) = (device.clone(), late.clone(), told.clone());
        std::thread::spawn(move || write(|packet| device.try_send(packet), receiver, rest, &late, &told));
        sender
    });
    let reader = {
        let told = told.clone();
        std::thread::spawn(move || runtime.block_on(read(&device, paths, &senders, &told)))
    };
    // Until the other end of the pipe is gone.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    if reader.is_finished() {
        bail!("the TUN device cannot be read any more");
    }
    let late = late.lock().expect("nobody panics with it").clone();
    let Told { num_entered, num_lost, num_queue_full, num_too_many, num_unwritten } =
        std::mem::take(&mut *told.lock().expect("nobody panics with it"));
    let num_missed = num_too_many + num_unwritten + num_dropped_by_kernel()?;
    let cpu_seconds = usage::of_process(std::process::id()).unwrap_or_default().cpu_seconds;
    println!(
        "{num_entered} packets entered, {num_lost} lost by chance, {num_queue_full} found the queue full, {num_missed} \
         lost by the emulator; left late by {} / {} / {} us (p50 / p99 / max); the emulator took {cpu_seconds:.1} CPU s",
        late_at(&late, 0.5),
        late_at(&late, 0.99),
        late_at(&late, 1.0),
    );
    std::io::stdout().flush().context("tell the process that measures")
}

/// Addresses and routes. Each end has its own address, and a way to the other's.
fn set_up(mtu: u16) -> anyhow::Result<()> {
    let [receiver, sender] = [RECEIVER, SENDER].map(|ip| format!("{ip}/32"));
    ip(&["link", "set", "lo", "up"])?;
    for address in [&receiver, &sender] {
        ip(&["address", "add", address, "dev", DEVICE])?;
    }
    ip(&["link", "set", DEVICE, "mtu", &mtu.to_string(), "txqueuelen", DEVICE_QUEUE_PACKETS, "up"])?;
    ip(&["route", "add", &far(SENDER), "dev", DEVICE, "src", &RECEIVER.to_string()])?;
    ip(&["route", "add", &far(RECEIVER), "dev", DEVICE, "src", &SENDER.to_string()])
}

/// Has connections that the sender accepts from now on under that congestion control; without one, under the kernel's
/// own choice.
///
/// # Errors
/// If the kernel does not have it.
pub(in crate::transfer) fn set_congestion_control(name: Option<&str>) -> anyhow::Result<()> {
    let (to, from) = (far(RECEIVER), SENDER.to_string());
    let mut words = vec!["route", "change", &to, "dev", DEVICE, "src", &from];
    words.extend(name.into_iter().flat_map(|name| ["congctl", name]));
    ip(&words)
}

/// As the other end knows it.
fn far(address: Ipv4Addr) -> String {
    let [a, b, _, d] = address.octets();
    format!("{a}.{b}.{FAR}.{d}/32")
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(words).output().context("run ip, which iproute2 has")?;
    if !output.status.success() {
        bail!("ip {} failed: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Reads until the device fails.
async fn read(device: &Tun, mut paths: [Path; 2], senders: &[SyncSender<OnTheWay>], told: &Mutex<Told>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(num_bytes) = device.recv(&mut buffer).await {
        let mut packet = buffer[..num_bytes].to_vec();
        // What is neither is a question of the kernel to its neighbours.
        let Some(direction) = translate(&mut packet) else { continue };
        let fate = paths[direction as usize].enter(Instant::now(), num_bytes);
        let mut told = told.lock().expect("nobody panics with it");
        told.num_entered += 1;
        match fate {
            Fate::Lost => told.num_lost += 1,
            Fate::QueueFull => told.num_queue_full += 1,
            Fate::Leaves(at) => match senders[direction as usize].try_send((at, packet)) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => told.num_too_many += 1,
                Err(TrySendError::Disconnected(_)) => return,
            },
        }
    }
}

/// Makes a packet one that comes from the far address of its sender to the near one of its receiver. `None` if it is
/// none of the two ends'. The two bytes that change places stand at the same place of two 16-bit words, so no
/// checksum changes.
fn translate(packet: &mut [u8]) -> Option<Direction> {
    if packet.len() < HEADER_BYTES || packet[0] >> 4 != 4 {
        return None;
    }
    let [source, destination] =
        [SOURCE, DESTINATION].map(|at| [packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
    let far = |[a, b, _, d]: [u8; 4]| [a, b, FAR, d];
    let direction = if (source, destination) == (RECEIVER.octets(), far(SENDER.octets())) {
        Direction::ToSender
    } else if (source, destination) == (SENDER.octets(), far(RECEIVER.octets())) {
        Direction::ToReceiver
    } else {
        return None;
    };
    packet[SOURCE + 2] = FAR;
    packet[DESTINATION + 2] = NEAR;
    Some(direction)
}

/// How long to sleep before a packet that leaves at `at`. Never short: what comes due meanwhile leaves with it.
fn rest_before(at: Instant, now: Instant, rest: Duration) -> Option<Duration> {
    let early = at.checked_duration_since(now).filter(|early| !early.is_zero())?;
    Some(early.max(rest))
}

/// How often a packet was so many microseconds late.
type Late = Arc<Mutex<Vec<u64>>>;

/// Writes what has crossed the link, in order.
fn write(
    send: impl Fn(&[u8]) -> io::Result<usize>,
    packets: Receiver<OnTheWay>,
    rest: Duration,
    late: &Mutex<Vec<u64>>,
    told: &Mutex<Told>,
) {
    for (at, packet) in packets {
        if let Some(rest) = rest_before(at, Instant::now(), rest) {
            std::thread::sleep(rest);
        }
        if send(&packet).is_err() {
            told.lock().expect("nobody panics with it").num_unwritten += 1;
        }
        let micros = Instant::now().saturating_duration_since(at).as_micros();
        let index = usize::try_from(micros).unwrap_or(LATE_MICROS_MAX).min(LATE_MICROS_MAX);
        late.lock().expect("nobody panics with it")[index] += 1;
    }
}

/// Microseconds that this share of all were not later than.
fn late_at(late: &[u64], share: f64) -> usize {
    let wanted = (late.iter().sum::<u64>() as f64 * share).ceil() as u64;
    let mut sum = 0;
    late.iter()
        .position(|count| {
            sum += count;
            sum >= wanted.max(1)
        })
        .unwrap_or_default()
}

/// Packets that the device's queue had no room for, since the emulator did not read fast enough, and those that the
/// kernel did not take in from it.
fn num_dropped_by_kernel() -> anyhow::Result<u64> {
    let devices = std::fs::read_to_string("/proc/net/dev").context("read what the device dropped")?;
    num_dropped(&devices).context("/proc/net/dev does not say what the device dropped")
}

fn num_dropped(devices: &str) -> Option<u64> {
    let line = devices.lines().find_map(|line| line.trim().strip_prefix(DEVICE)?.strip_prefix(':'))?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    // Bytes, packets, errors, drops and four more of what was received, which is what the emulator wrote; then the same
    // of what was sent.
    let [received, sent] = [3, 11].map(|index| fields.get(index)?.parse::<u64>().ok());
    Some(received? + sent?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45; 28];
        packet[SOURCE..SOURCE + 4].copy_from_slice(&source);
        packet[DESTINATION..DESTINATION + 4].copy_from_slice(&destination);
        packet
    }

    /// As the checksums of IP, UDP and TCP add up, pseudo-header and all.
    fn sum(packet: &[u8]) -> u32 {
        packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum()
    }

    #[test]
    fn packet_comes_from_where_the_other_end_answers_to_and_its_checksums_still_hold() {
        for (from, to, direction) in
            [(RECEIVER, SENDER, Direction::ToSender), (SENDER, RECEIVER, Direction::ToReceiver)]
        {
            let far = |[a, b, _, d]: [u8; 4]| [a, b, FAR, d];
            let mut translated = packet(from.octets(), far(to.octets()));
            let before = sum(&translated);
            assert_eq!(translate(&mut translated), Some(direction));
            assert_eq!(translated, packet(far(from.octets()), to.octets()));
            assert_eq!(sum(&translated), before);
        }
    }

    #[test]
    fn what_is_of_neither_end_does_not_cross() {
        let mut stray = packet([10, 77, 0, 1], [10, 77, 0, 2]);
        assert_eq!(translate(&mut stray), None);
        stray[0] = 0x60;
        assert_eq!(translate(&mut stray), None);
        assert_eq!(translate(&mut []), None);
    }

    #[test]
    fn no_packet_leaves_early_and_those_that_follow_closely_leave_together() {
        let began = Instant::now();
        let (mut now, mut num_rests) = (began, 0);
        // Packets of 9,000 bytes at 4 Gbit/s.
        for index in 0..1000 {
            let at = began + index * Duration::from_micros(18);
            if let Some(rest) = rest_before(at, now, REST) {
                now += rest;
                num_rests += 1;
            }
            assert!(now >= at && now - at <= REST);
        }
        assert!((100..=200).contains(&num_rests), "{num_rests}");
        // And what is far off is not waited for in steps.
        assert_eq!(rest_before(now + 9 * REST, now, REST), Some(9 * REST));
    }

    #[test]
    fn packet_that_the_device_does_not_take_is_counted() {
        let (sender, receiver) = sync_channel(3);
        for byte in [1, 2, 3] {
            sender.send((Instant::now(), vec![byte])).unwrap();
        }
        drop(sender);
        let (late, told) = (Mutex::new(vec![0; LATE_MICROS_MAX + 1]), Mutex::default());
        let send = |packet: &[u8]| match packet {
            [2] => Err(io::ErrorKind::WouldBlock.into()),
            packet => Ok(packet.len()),
        };
        write(send, receiver, REST, &late, &told);
        assert_eq!(told.lock().unwrap().num_unwritten, 1);
    }

    #[test]
    fn what_the_kernel_drops_in_either_direction_is_counted() {
        let devices = "Inter-|   Receive                                                |  Transmit\n \
                       face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo\n\
                       lo: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n\
                       tandem-link: 10 20 30 5 50 60 70 80 90 100 110 7 130 140 150 160\n";
        assert_eq!(num_dropped(devices), Some(12));
        assert_eq!(num_dropped("lo: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n"), None);
    }

    #[test]
    fn lateness_is_that_of_the_share_asked_for() {
        let mut late = vec![0; 100];
        (late[3], late[70]) = (99, 1);
        assert_eq!([0.5, 0.99, 1.0].map(|share| late_at(&late, share)), [3, 3, 70]);
        assert_eq!(late_at(&[0; 10], 0.5), 0);
    }
}
