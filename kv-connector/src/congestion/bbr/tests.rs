//! A connection, and several, over a link without a clock.

use super::*;
use crate::congestion::cubic_model::Cubic;
use crate::congestion::link::{DATAGRAM_BYTES, LinkConfig, Network};

const ENDLESS: u64 = u64::MAX / 4;

fn link(megabits: f64, rtt_millis: u64) -> LinkConfig {
    LinkConfig {
        bits_per_second: megabits * 1e6,
        rtt: Duration::from_millis(rtt_millis),
        queue_bytes: 1 << 20,
        loss: 0.001,
        ack_every: 2,
        datagram_bytes: DATAGRAM_BYTES,
    }
}

fn add(network: &mut Network, config: LinkConfig, num_datagrams: u64) -> usize {
    let flow = network.add(Box::new(Bbr::new(network.now(), 12_000, config.datagram_bytes)));
    network.write(flow, num_datagrams);
    flow
}

/// A connection with all there is to send, after a hundred round trips.
fn at_speed(config: LinkConfig) -> Network {
    let mut network = Network::new(config);
    add(&mut network, config, ENDLESS);
    network.run(config.rtt * 100);
    network
}

#[test]
fn lossy_link_is_full_and_its_queue_is_not_longer_than_what_it_holds() {
    for (megabits, rtt_millis) in [(500.0, 1), (1000.0, 1), (2000.0, 1), (4000.0, 1), (100.0, 20), (10.0, 100)] {
        let jumbo = LinkConfig { datagram_bytes: 8_950, ..link(megabits, rtt_millis) };
        for config in [link(megabits, rtt_millis), jumbo] {
            let mut network = at_speed(config);
            let share = network.run(config.rtt * 500)[0];
            assert!(share >= 0.95, "{share} of {config:?}");
            // Beside twice what the link holds: what goes at once, and what acknowledgements bring at once.
            let most = 1.5 * config.held_bytes() + 80_000.0;
            assert_eq!(network.overflown(), 0.0, "{config:?}");
            let longest = network.longest_queue_bytes();
            assert!((longest as f64) < most, "{longest} in {config:?}");
        }
    }
}

#[test]
fn much_is_lost_by_chance_and_the_link_is_nearly_full() {
    for (loss, least) in [(0.01, 0.95), (0.02, 0.9), (0.05, 0.8)] {
        let config = LinkConfig { loss, ..link(1000.0, 1) };
        let share = at_speed(config).run(config.rtt * 500)[0];
        assert!(share >= least, "{share} with {loss} lost");
    }
}

#[test]
fn short_queue_is_not_flooded() {
    let millisecond = link(2000.0, 1);
    // Ten Gbit/s over a tenth of a millisecond hold 125,000 bytes.
    let short = LinkConfig { bits_per_second: 1e10, rtt: Duration::from_micros(100), ..millisecond };
    for (queue_bytes, link) in [(32 << 10, millisecond), (128 << 10, millisecond), (128 << 10, short)] {
        let config = LinkConfig { queue_bytes, ..link };
        let mut network = at_speed(config);
        let share = network.run(config.rtt * 1000)[0];
        assert!(share >= 0.9, "{share} with {queue_bytes}");
        assert!(network.overflown() < 0.03, "{} with {queue_bytes}", network.overflown());
    }
}

#[test]
fn acknowledgements_that_come_seldom_do_not_stop_it() {
    let config = LinkConfig { ack_every: 64, ..link(1000.0, 1) };
    let mut network = at_speed(config);
    network.run(config.rtt * 200);
    let share = network.run(config.rtt * 500)[0];
    assert!(share >= 0.9, "{share}");
    assert!(network.longest_queue_bytes() < 4 * config.held_bytes() as u64);
}

#[test]
fn connections_share_a_link_whenever_they_began() {
    let config = link(1000.0, 1);
    let mut network = at_speed(config);
    network.run(config.rtt * 300);
    add(&mut network, config, ENDLESS);
    add(&mut network, config, ENDLESS);
    network.run(config.rtt * 4000);
    let shares = network.run(config.rtt * 2000);
    assert!(shares.iter().all(|share| (0.2..0.5).contains(share)), "{shares:?}");
    assert!(shares.iter().sum::<f64>() >= 0.95, "{shares:?}");
    assert!(network.overflown() < 0.01, "{}", network.overflown());
}

/// A queue of twice what the link holds takes what two have on the way, but not what they have once either has thought
/// the link its own.
#[test]
fn two_connections_share_a_link_that_overflows_now_and_then() {
    for (rounds_between, loss) in [(0, 0.0), (0, 0.001), (100, 0.001)] {
        let config = LinkConfig { loss, datagram_bytes: 8_950, ..link(4000.0, 1) };
        let config = LinkConfig { queue_bytes: (2.0 * config.held_bytes()) as u64, ..config };
        let mut network = Network::new(config);
        add(&mut network, config, ENDLESS);
        network.run(config.rtt * rounds_between);
        add(&mut network, config, ENDLESS);
        network.run(config.rtt * 1000);
        for _ in 0..6 {
            let shares = network.run(config.rtt * 500);
            assert!(shares.iter().all(|share| (0.3..0.7).contains(share)), "{shares:?} with {rounds_between}, {loss}");
        }
        assert!(network.overflown() < 0.02, "{} with {rounds_between}, {loss}", network.overflown());
    }
}

#[test]
fn neither_it_nor_cubic_starves_beside_the_other() {
    for (queue, most) in [(0.5, 0.8), (1.0, 0.8), (4.0, 0.7)] {
        let config = LinkConfig { loss: 0.0, ..link(1000.0, 1) };
        let config = LinkConfig { queue_bytes: (queue * config.held_bytes()) as u64, ..config };
        let mut network = at_speed(config);
        let cubic = network.add(Box::new(Cubic::new(DATAGRAM_BYTES)));
        network.write(cubic, ENDLESS);
        network.run(config.rtt * 1000);
        let shares = network.run(config.rtt * 4000);
        assert!((0.3..most).contains(&shares[0]) && shares[1] >= 0.15, "{shares:?} with a queue of {queue}");
    }
}

#[test]
fn rate_that_falls_to_a_tenth_and_one_that_grows_tenfold_are_found() {
    let config = link(1000.0, 1);
    let mut network = at_speed(config);
    network.set_rate(100e6);
    network.run(config.rtt * 1500);
    let share = network.run(config.rtt * 500)[0];
    assert!(share >= 0.9, "{share} of a tenth");
    assert!(network.overflown() < 0.02 && network.longest_queue_bytes() < 200_000);
    network.set_rate(1000e6);
    network.run(config.rtt * 200);
    let share = network.run(config.rtt * 500)[0];
    assert!(share >= 0.9, "{share} of ten times as much");
}

#[test]
fn pause_and_little_to_send_leave_the_speed_as_it_was() {
    let config = link(1000.0, 1);
    let mut network = Network::new(config);
    let flow = add(&mut network, config, 20_000);
    network.run(Duration::from_secs(1));
    assert!(network.has_sent_all(flow));
    for _ in 0..2000 {
        network.write(flow, 3);
        network.run(Duration::from_millis(1));
    }
    network.run(Duration::from_secs(60));
    // So many at the link's rate, a round trip, and the delay of a last acknowledgement.
    network.write(flow, 10_000);
    let seconds = 10_000.0 * 8.0 * DATAGRAM_BYTES as f64 / config.bits_per_second;
    network.run(Duration::from_secs_f64(1.1 * seconds + 0.03));
    assert!(network.has_sent_all(flow));
    assert_eq!(network.overflown(), 0.0);
}

#[test]
fn transfers_with_pauses_in_between_each_have_the_whole_link() {
    let config = LinkConfig { ack_every: 1, loss: 0.0, queue_bytes: 8 << 20, ..link(1000.0, 10) };
    let mut network = Network::new(config);
    let flow = add(&mut network, config, 20_000);
    network.run(Duration::from_secs(1));
    for round in 0..10 {
        network.run(Duration::from_secs(3));
        network.write(flow, 5_000);
        // 58 ms at the link's rate, a round trip, and one more until the window is as large again.
        network.run(Duration::from_millis(58 + 20));
        assert!(network.has_sent_all(flow), "in round {round}");
    }
}

#[test]
fn silence_makes_it_begin_anew() {
    let (now, at) = (Instant::now(), |millis| Instant::now() + Duration::from_millis(millis));
    let mut bbr = Bbr::new(now, 12_000, 1200);
    bbr.on_sent(now, 12_000);
    (0..10).for_each(|_| bbr.on_ack(now, 1200));
    bbr.on_end_acks(at(10), 0, false);
    assert!(bbr.window_bytes() > 12_000);
    bbr.on_congestion(at(900), at(500), 12_000, true);
    assert_eq!(bbr.window_bytes(), 4 * 1200);
    // What was sent before is acknowledged after all.
    bbr.on_ack(now, 1200);
    bbr.on_end_acks(at(901), 1200, false);
    assert_eq!(bbr.window_bytes(), 4 * 1200);
    bbr.on_sent(at(902), 4800);
    bbr.on_datagram_size(9000);
    assert_eq!(bbr.window_bytes(), 4 * 9000);
}

#[test]
fn marks_lower_the_window_without_a_loss() {
    let config = LinkConfig { loss: 0.0, ..link(1000.0, 1) };
    let (mut marked, mut unmarked) = (at_speed(config), at_speed(config));
    marked.mark_above(60_000);
    marked.run(config.rtt * 300);
    let share = marked.run(config.rtt * 500)[0];
    unmarked.run(config.rtt * 800);
    assert!(share >= 0.9, "{share}");
    assert!(marked.longest_queue_bytes() < unmarked.longest_queue_bytes() * 3 / 4);
}
