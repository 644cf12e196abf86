//! How much of a certificate's life is left, and whether that is little.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use identity::Described;

use super::finding::Level;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// A certificate of a longer life is renewed by hand, and judged by days; a shorter one by its share of life, because the
/// node renews it at half of it.
const BY_HAND: Duration = DAY.saturating_mul(90);

/// A certificate's life, judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) level: Level,
    /// Such as "it expires in 3days, on 2026-11-29T…".
    pub(super) what: String,
    /// Whether its first moment is still to come.
    pub(super) is_future: bool,
}

/// Judges a certificate's life at `now`.
pub(super) fn judge(certificate: &Described, now: SystemTime) -> Life {
    let whole = certificate.until.duration_since(certificate.from).unwrap_or_default();
    let mut life = at(certificate, now, |left| level(whole, left));
    let is_running = certificate.from <= now && now <= certificate.until;
    if is_running && whole <= BY_HAND && life.level > Level::Ok {
        life.what.push_str("; renewal should have happened at half of its life");
    }
    life
}

/// As [`judge`], for what nobody renews but people, however long it lives.
pub(super) fn by_days(certificate: &Described, now: SystemTime) -> Life {
    at(certificate, now, days)
}

/// Judges a certificate's life at `now`; `level` judges what is left of it.
fn at(certificate: &Described, now: SystemTime, level: impl Fn(Duration) -> Level) -> Life {
    let Described { from, until, .. } = certificate;
    let (first, last) = (date(*from), date(*until));
    let said = |level, what, is_future| Life { level, what, is_future };
    if let Ok(early) = from.duration_since(now).map(|early| early + Duration::from_secs(1))
        && now < *from
    {
        return said(Level::Error, format!("it begins only in {}, on {first}", short(early)), true);
    }
    let Ok(left) = until.duration_since(now) else {
        let since = now.duration_since(*until).unwrap_or_default();
        return said(Level::Error, format!("it expired {} ago, on {last}", short(since)), false);
    };
    said(level(left), format!("it expires in {}, on {last}", short(left)), false)
}

fn level(whole: Duration, left: Duration) -> Level {
    if whole <= BY_HAND {
        return match left {
            left if left * 24 < whole => Level::Error,
            left if left * 24 < whole * 11 => Level::Warning,
            _ => Level::Ok,
        };
    }
    days(left)
}

fn days(left: Duration) -> Level {
    match left {
        left if left < DAY * 7 => Level::Error,
        left if left < DAY * 30 => Level::Warning,
        left if left < DAY * 60 => Level::Note,
        _ => Level::Ok,
    }
}

fn date(time: SystemTime) -> String {
    let mut text = String::new();
    if write!(text, "{}", humantime::format_rfc3339_seconds(time)).is_err() {
        text = "a day after the year 9999".to_owned();
    }
    text
}

/// A duration as people say it: days, or hours and minutes, or seconds.
fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use base::clock;

    use super::*;

    fn life_of(whole: Duration, left: Duration) -> Life {
        let now = clock::wall();
        let until = now + left;
        let (id, hosts, subject, serial) = (None, Vec::new(), String::new(), String::new());
        judge(&Described { id, hosts, subject, serial, from: until - whole, until }, now)
    }

    #[test]
    fn long_lives_are_judged_by_days() {
        for (days, level) in [
            (61, Level::Ok),
            (60, Level::Ok),
            (59, Level::Note),
            (29, Level::Warning),
            (6, Level::Error),
        ] {
            assert_eq!(life_of(DAY * 365, DAY * days).level, level, "{days} days");
        }
    }

    #[test]
    fn what_people_renew_is_judged_by_days_however_long_it_lives() {
        let now = clock::wall();
        let until = now + DAY * 20;
        let (id, hosts, subject, serial) = (None, Vec::new(), String::new(), String::new());
        let month = Described { id, hosts, subject, serial, from: until - DAY * 30, until };
        let life = by_days(&month, now);
        assert_eq!(life.level, Level::Warning);
        assert!(!life.what.contains("half of its life"), "{}", life.what);
        assert_eq!(judge(&month, now).level, Level::Ok);
    }

    #[test]
    fn short_lives_are_judged_by_their_share() {
        let hour = DAY / 24;
        for (hours, level) in
            [(24, Level::Ok), (12, Level::Ok), (10, Level::Warning), (1, Level::Warning)]
        {
            assert_eq!(life_of(DAY, hour * hours).level, level, "{hours} h");
        }
        assert_eq!(life_of(DAY, hour / 2).level, Level::Error);
        assert!(life_of(DAY, hour * 10).what.contains("half of its life"));
    }

    #[test]
    fn what_is_over_or_to_come_is_an_error() {
        let now = clock::wall();
        let (id, hosts, subject, serial) = (None, Vec::new(), String::new(), String::new());
        let mut certificate =
            Described { id, hosts, subject, serial, from: now - DAY * 3, until: now - DAY };
        let over = judge(&certificate, now);
        assert_eq!((over.level, over.is_future), (Level::Error, false));
        assert!(over.what.starts_with("it expired 24 h ago"), "{}", over.what);
        (certificate.from, certificate.until) = (now + DAY, now + DAY * 2);
        assert_eq!(
            (judge(&certificate, now).level, judge(&certificate, now).is_future),
            (Level::Error, true)
        );
    }
}
