//! What a check found: how bad it is, what to do, and where it is explained; and the report of all of them.

use serde_json::{Value, json};

/// Where every check has its section.
const DOCUMENT: &str = "docs/checks.md";
const NOTHING_TO_DO: &str = "nothing to do";

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Ok,
    Note,
    Warning,
    Error,
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

macro_rules! checks {
    ($($name:ident $text:literal)*) => {
        /// Which check found it: stable, so that scripts may rely on it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Check {
            $($name,)*
        }

        impl Check {
            #[cfg(test)]
            const ALL: &[Self] = &[$(Self::$name),*];

            pub(super) fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

checks! {
    CertificateMissing "certificate.missing"
    CertificateUnreadable "certificate.unreadable"
    CertificateKeyExposed "certificate.key-exposed"
    CertificateKeyMismatch "certificate.key-mismatch"
    CertificateUntrusted "certificate.untrusted"
    CertificateWrongId "certificate.wrong-id"
    CertificateExpiring "certificate.expiring"
    CertificateAuthorityExpiring "certificate.authority-expiring"
    CertificateNames "certificate.names"
    CertificateRevoked "certificate.revoked"
    SpireAgent "spire.agent"
    AuthorityUnusable "authority.unusable"
    AuthorityExpiring "authority.expiring"
    AuthorityRootKey "authority.root-key"
    AccessUnusable "access.unusable"
    AccessNobody "access.nobody"
    ServedDiffers "served.differs"
    ListenTaken "listen.taken"
    ListenForbidden "listen.forbidden"
    ListenNotHere "listen.not-here"
    ListenLoopback "listen.loopback"
    ListenPlaintext "listen.plaintext"
    ListenMetrics "listen.metrics"
    ListenAdmin "listen.admin"
    SystemBuffers "system.buffers"
    SystemOffload "system.offload"
    SystemDescriptors "system.descriptors"
    SystemMtu "system.mtu"
    TrapStateDir "trap.state-dir"
    TrapStateInMemory "trap.state-in-memory"
    TrapSelfPeer "trap.self-peer"
    TrapSameAddress "trap.same-address"
    TrapEngineLoop "trap.engine-loop"
    TrapHealthInterval "trap.health-interval"
    TrapDefaultRegion "trap.default-region"
    TrapNoGossip "trap.no-gossip"
    DnsResolvers "dns.resolvers"
    DnsLocalhost "dns.localhost"
    DnsUnresolved "dns.unresolved"
    DnsSlow "dns.slow"
    DnsFamily "dns.family"
    ClockSkew "clock.skew"
    ClockImplausible "clock.implausible"
    ClockUnmeasured "clock.unmeasured"
    PeerUnreachable "peer.unreachable"
    PeerUdp "peer.udp"
    PeerTcp "peer.tcp"
    PeerGossip "peer.gossip"
    PeerIdentity "peer.identity"
    PeerRefuses "peer.refuses"
    PeerExpiring "peer.expiring"
    PeerRevoked "peer.revoked"
    SeedGossip "seed.gossip"
    SeedAuthority "seed.authority"
    SeedIdentity "seed.identity"
    SeedRefuses "seed.refuses"
    EngineUnreachable "engine.unreachable"
}

impl Check {
    /// The anchor of its section.
    fn anchor(self) -> String {
        self.as_str().replace('.', "-")
    }
}

/// One thing that was found.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) level: Level,
    pub(super) check: Check,
    /// What it is about: a file, a port, a peer.
    pub(super) subject: String,
    /// One sentence, with the figures.
    pub(super) what: String,
    /// What to do.
    pub(super) remedy: String,
}

impl Finding {
    pub(super) fn new(
        level: Level,
        check: Check,
        subject: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (subject, what) = (printable(subject.into()), printable(what.into()));
        Self { level, check, subject, what, remedy: remedy.into() }
    }

    pub(super) fn ok(check: Check, subject: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(Level::Ok, check, subject, what, NOTHING_TO_DO)
    }

    pub(super) fn note(
        check: Check,
        subject: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Level::Note, check, subject, what, remedy)
    }

    pub(super) fn warning(
        check: Check,
        subject: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Level::Warning, check, subject, what, remedy)
    }

    pub(super) fn error(
        check: Check,
        subject: impl Into<String>,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(Level::Error, check, subject, what, remedy)
    }

    fn see(&self) -> String {
        format!("{DOCUMENT}#{}", self.check.anchor())
    }
}

/// Others' words are among them, and a terminal obeys control characters.
fn printable(text: String) -> String {
    text.replace(char::is_control, " ")
}

fn count(findings: &[Finding], level: Level) -> usize {
    findings.iter().filter(|finding| finding.level == level).count()
}

/// The report for programs.
pub(super) fn json(findings: &[Finding]) -> Value {
    let list: Vec<_> = findings
        .iter()
        .map(|finding| {
            json!({
                "level": finding.level.as_str(),
                "check": finding.check.as_str(),
                "subject": finding.subject,
                "what": finding.what,
                "remedy": finding.remedy,
                "see": finding.see(),
            })
        })
        .collect();
    json!({ "ok": count(findings, Level::Error) == 0, "findings": list })
}

/// The report for people: what belongs to one subject together, in the order of first mention.
pub(super) fn text(findings: &[Finding]) -> String {
    let mut subjects: Vec<&str> = Vec::new();
    for finding in findings {
        if !subjects.contains(&finding.subject.as_str()) {
            subjects.push(&finding.subject);
        }
    }
    let mut lines = Vec::new();
    for subject in subjects {
        lines.push(subject.to_owned());
        lines.extend(findings.iter().filter(|f| f.subject == subject).map(line));
    }
    let (errors, warnings) = (count(findings, Level::Error), count(findings, Level::Warning));
    lines.push(format!("{errors} errors, {warnings} warnings"));
    lines.join("\n")
}

fn line(finding: &Finding) -> String {
    let (level, what) = (finding.level.as_str(), &finding.what);
    match finding.level {
        Level::Ok => format!("  {level:7}  {what}"),
        _ => format!("  {level:7}  {what} -> {} ({})", finding.remedy, finding.see()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_check_has_its_section_and_every_section_its_check() {
        let document = include_str!("../../../../docs/checks.md");
        let sections: Vec<_> =
            document.lines().filter_map(|line| line.strip_prefix("### ")).collect();
        let anchors: BTreeSet<_> = Check::ALL.iter().map(|check| check.anchor()).collect();
        assert_eq!(sections.len(), anchors.len(), "a section or an id stands there twice");
        assert_eq!(anchors, sections.into_iter().map(str::to_owned).collect());
    }

    #[test]
    fn nobody_elses_words_reach_the_terminal_as_commands() {
        let found = Finding::ok(Check::PeerTcp, "peer\n", "said \u{1b}[2J");
        assert_eq!((found.subject.as_str(), found.what.as_str()), ("peer ", "said  [2J"));
    }

    #[test]
    fn a_report_groups_by_subject_and_counts() {
        let findings = [
            Finding::ok(Check::PeerTcp, "peer b", "h2 answers"),
            Finding::warning(Check::ListenPlaintext, "listen.plaintext", "open", "close it"),
            Finding::error(Check::PeerUdp, "peer b", "h3 is silent", "open UDP port 8444"),
        ];
        let text = text(&findings);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        assert_eq!(
            lines[..3],
            [
                "peer b",
                "ok       h2 answers",
                "error    h3 is silent -> open UDP port 8444 (docs/checks.md#peer-udp)",
            ]
        );
        assert_eq!(lines.last(), Some(&"1 errors, 1 warnings"));
        let json = json(&findings);
        assert_eq!(json["ok"], false);
        assert_eq!(json["findings"][1]["see"], "docs/checks.md#listen-plaintext");
    }
}
