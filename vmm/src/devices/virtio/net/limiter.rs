//! Token buckets: how much of a direction's traffic may pass now.
//!
//! A bucket is kept as the time at which it would be full (the "virtual scheduling" form of the
//! leaky bucket, ITU-T I.371): no tokens are counted, nothing is refilled. A frame passes when there is
//! any token and is paid for afterwards, in full, because what the host sends is measured by reading it.

use crate::api::RateLimit;

const SECOND: u128 = 1_000_000_000;
/// What an idle bucket holds: the traffic of so many nanoseconds.
pub(super) const BURST: u64 = 100_000_000;
/// How many nanoseconds of traffic are let gather after the bucket was empty: wake-ups are at least
/// so far apart.
pub(super) const GATHER: u64 = 1_000_000;

/// Units of one kind, `rate` of them a second; 0: any number.
#[derive(Debug, Default)]
struct Bucket {
    rate: u64,
    /// When it would be full, in nanoseconds.
    full: u64,
    /// Of the nanosecond at `full`, in fractions of `rate`.
    part: u64,
}

impl Bucket {
    fn wait(&self, now: u64) -> Option<u64> {
        let open = self.full.saturating_sub(BURST);
        (self.rate > 0 && open > now).then(|| open.saturating_add(GATHER))
    }

    fn pay(&mut self, now: u64, units: u64) {
        if self.rate == 0 {
            return;
        }
        if self.full < now {
            (self.full, self.part) = (now, 0);
        }
        let (rate, cost) = (u128::from(self.rate), u128::from(units) * SECOND + u128::from(self.part));
        self.full = self.full.saturating_add(u64::try_from(cost / rate).unwrap_or(u64::MAX));
        self.part = u64::try_from(cost % rate).unwrap_or(0);
    }
}

/// The limits of one direction. Times are nanoseconds of one monotonic clock.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    bytes: Bucket,
    frames: Bucket,
}

impl Limiter {
    pub(super) fn new(limit: RateLimit) -> Self {
        let bucket = |rate| Bucket { rate, ..Bucket::default() };
        Self { bytes: bucket(limit.bytes_per_s), frames: bucket(limit.packets_per_s) }
    }

    /// Whether there is any limit, so that the time matters.
    pub(super) fn is_limited(&self) -> bool {
        self.bytes.rate > 0 || self.frames.rate > 0
    }

    /// When the next frame may pass; `None`: now.
    pub(super) fn wait(&self, now: u64) -> Option<u64> {
        self.bytes.wait(now).max(self.frames.wait(now))
    }

    /// A frame of `bytes` has passed.
    pub(super) fn pay(&mut self, now: u64, bytes: usize) {
        self.bytes.pay(now, bytes as u64);
        self.frames.pay(now, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes_per_s: u64, packets_per_s: u64) -> Limiter {
        Limiter::new(RateLimit { bytes_per_s, packets_per_s })
    }

    /// Sends frames of `bytes` as fast as it may from `start` to `end`; how many.
    fn send(limiter: &mut Limiter, bytes: usize, start: u64, end: u64) -> u64 {
        let (mut now, mut frames) = (start, 0);
        while now < end {
            match limiter.wait(now) {
                Some(until) => now = until,
                None => {
                    limiter.pay(now, bytes);
                    frames += 1;
                }
            }
        }
        frames
    }

    const TEN_SECONDS: u64 = 10_000_000_000;

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = limiter(0, 0);
        assert!(!limiter.is_limited());
        for _ in 0..1000 {
            assert_eq!(limiter.wait(7), None);
            limiter.pay(7, usize::MAX);
        }
    }

    #[test]
    fn the_rate_holds_over_time_and_the_burst_comes_once() {
        for (bytes, frames, size, expected) in [
            (1_000_000, 0, 1000, 10_100),
            (0, 1000, 1000, 10_100),
            // A rate that is no divisor of a second, and the tighter of two.
            (1_000_003, 3_000, 100, 30_300),
            (7, 0, 1, 71),
            (0, 1, 65_000, 11),
            (u64::MAX, 10_000, 1, 101_000),
        ] {
            let sent = send(&mut limiter(bytes, frames), size, 5, 5 + TEN_SECONDS);
            assert!(sent.abs_diff(expected) <= expected / 1000 + 1, "{bytes} {frames}: {sent}");
        }
    }

    #[test]
    fn an_idle_bucket_holds_one_burst() {
        let mut limiter = limiter(0, 1000);
        let burst = |limiter: &mut Limiter, now| {
            (0..1000)
                .take_while(|_| {
                    limiter.wait(now).is_none() && {
                        limiter.pay(now, 1);
                        true
                    }
                })
                .count()
        };
        let hour = 3_600_000_000_000;
        assert_eq!(burst(&mut limiter, hour), 101);
        assert_eq!(burst(&mut limiter, hour), 0);
        assert_eq!(burst(&mut limiter, 2 * hour), 101);
    }

    #[test]
    fn a_frame_larger_than_the_burst_passes_and_is_paid_for() {
        let mut limiter = limiter(1000, 0);
        assert_eq!(limiter.wait(0), None);
        limiter.pay(0, 60_000);
        let until = limiter.wait(0).unwrap();
        assert_eq!(until, 60_000_000_000 - BURST + GATHER);
        assert_eq!(limiter.wait(until), None);
    }

    #[test]
    fn extreme_values_neither_panic_nor_end() {
        let mut limiter = limiter(1, 1);
        limiter.pay(u64::MAX - 1, usize::MAX);
        assert_eq!(limiter.wait(u64::MAX), None);
        let _ = limiter.wait(0);
    }
}
