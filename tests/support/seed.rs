//! One number decides every random choice of a test.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// The test's seed, drawn anew for each run; `TANDEM_TEST_SEED` replays one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    /// Draws the seed, or takes it from the environment, and prints it.
    pub(crate) fn draw() -> Self {
        let given = std::env::var("TANDEM_TEST_SEED").ok();
        let seed = match given {
            Some(text) => text.trim().parse().expect("TANDEM_TEST_SEED is a whole number"),
            // Short enough to be typed.
            None => u64::from(rand::random::<u32>()),
        };
        println!("seed {seed}: TANDEM_TEST_SEED={seed} replays this run");
        Self(seed)
    }

    /// A generator of its own for one purpose, so that purposes do not shift each other's draws.
    pub(crate) fn stream(self, purpose: u64) -> StdRng {
        StdRng::seed_from_u64(self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(purpose))
    }
}
