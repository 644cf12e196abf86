//! How an authority comes into being, and how certificates are put into files.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base::TrustDomain;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{
    Authority,
    csr::{make_key, make_request},
    issuing::Issuing,
    place::{Place, Settings, check_life},
};
use crate::{
    IdentityError, SpiffeId,
    dev::{ca_params, read_or_make_key},
    files,
    node::Paths,
};

const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const ROOT_LIFE: Duration = YEAR.saturating_mul(10);
const ISSUER_LIFE: Duration = YEAR;

const KEY_REMEDY: &str = "run the command again to have it made anew";
const KEPT_KEY_REMEDY: &str = "leave out --keep-key to have one made";

impl Authority {
    /// Makes an authority in `dir`: a root, whose key belongs offline, and what signs for nodes under it in
    /// `dir/authority`. Certificates of nodes will live for `life`.
    ///
    /// # Errors
    /// There is an authority in `dir`, or it cannot be written. An attempt that was cut short leaves files behind that
    /// the next one names.
    pub fn init(
        dir: &Path,
        trust_domain: &TrustDomain,
        life: Duration,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let settings = Settings { trust_domain: trust_domain.clone(), life };
        let made = Making::begin(dir, &settings)?;
        let root = made.root(&settings.trust_domain, now)?;
        let pem = make_issuer(&made.place.issuer_key(), &root, trust_domain, now)?;
        files::replace_durably(&made.place.issuer(), files::PUBLIC, pem.as_bytes())?;
        files::replace_durably(&made.place.roots(), files::PUBLIC, root.pem.as_bytes())?;
        made.finish(&settings, now)
    }

    /// Makes an authority in `dir` from an issuing certificate with its intermediates (`cert`), its key and the roots
    /// that nodes are to believe: the root is somebody else's.
    ///
    /// # Errors
    /// The files cannot serve as an authority, there is one in `dir`, or it cannot be written.
    pub fn import(
        dir: &Path,
        trust_domain: &TrustDomain,
        life: Duration,
        (cert, key, roots): (&Path, &Path, &Path),
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let found = Issuing::load(Paths { ca: roots, cert, key }, trust_domain, now)?;
        let settings = Settings { trust_domain: trust_domain.clone(), life };
        let made = Making::begin(dir, &settings)?;
        let secret = files::read_if_there(key)?.unwrap_or_default();
        files::replace_durably(&made.place.issuer_key(), files::SECRET, &secret)?;
        let write = |path: PathBuf, certificates: &[CertificateDer<'static>]| {
            files::replace_durably(&path, files::PUBLIC, pem_of(certificates).as_bytes())
        };
        write(made.place.issuer(), &found.chain)?;
        write(made.place.roots(), &found.roots)?;
        made.finish(&settings, now)
    }

    /// Writes `out/key.pem` (0600) with a new key, or keeps the one that is there if it is told to, `out/cert.pem` for it,
    /// and `out/ca.pem` with the roots: the identity of a member that gets it by hand. `life` as with
    /// [`Self::sign_for`]. While the key changes there is no certificate, so that none is ever beside another's key.
    ///
    /// # Errors
    /// As [`Self::sign_for`], there is no key to keep, or `out` cannot be written.
    pub fn issue_to(
        &self,
        out: &Path,
        keep_key: bool,
        id: &SpiffeId,
        ips: &[IpAddr],
        life: Duration,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let [cert_path, key_path, ca_path] =
            ["cert.pem", "key.pem", "ca.pem"].map(|name| out.join(name));
        let key = match keep_key {
            true => files::read_secret_key(&key_path, KEPT_KEY_REMEDY)?,
            false => make_key()?,
        };
        let chain = self.sign_for(id, &make_request(&key)?, ips, life, now)?;
        files::create_secret_directory(out)?;
        if !keep_key {
            files::remove_if_there(&cert_path)?;
            let pem = files::pem(files::key_label(&key), [key.secret_der()].into_iter());
            files::replace_durably(&key_path, files::SECRET, pem.as_bytes())?;
        }
        files::replace_durably(&ca_path, files::PUBLIC, pem_of(self.roots()).as_bytes())?;
        files::replace_durably(&cert_path, files::PUBLIC, pem_of(&chain).as_bytes())
    }
}

/// An authority that is not in its place yet.
struct Making {
    dir: PathBuf,
    aside: tempfile::TempDir,
    place: Place,
}

impl Making {
    fn begin(dir: &Path, settings: &Settings) -> Result<Self, IdentityError> {
        check_life(settings.life)?;
        files::create_secret_directory(dir)?;
        // `authority.toml`: somebody named the inner directory.
        for taken in ["root.pem", "root.key", "authority", "authority.toml"] {
            let path = dir.join(taken);
            if files::exists(&path)? {
                return Err(IdentityError::AuthorityThere { path });
            }
        }
        let aside = tempfile::Builder::new().prefix(".new-").tempdir_in(dir);
        let aside = aside.map_err(files::failed("create a directory in", dir))?;
        let place = Place::at(aside.path().join("authority"));
        files::create_secret_directory(&place.tokens())?;
        Ok(Self { dir: dir.into(), aside, place })
    }

    fn root(&self, trust_domain: &TrustDomain, now: SystemTime) -> Result<Root, IdentityError> {
        let path = |name: &str| self.aside.path().join(name);
        let root = Root::make(&path("root.key"), trust_domain, now)?;
        files::replace_durably(&path("root.pem"), files::PUBLIC, root.pem.as_bytes())?;
        Ok(root)
    }

    /// The online part comes last: without it nothing works, and with it everything does.
    fn finish(self, settings: &Settings, now: SystemTime) -> Result<(), IdentityError> {
        self.place.write_settings(settings)?;
        drop(Authority::open(self.place.dir(), now)?);
        for part in ["root.key", "root.pem", "authority"] {
            files::rename_if_there(&self.aside.path().join(part), &self.dir.join(part))?;
        }
        let dir = &self.dir;
        fs::File::open(dir).and_then(|d| d.sync_all()).map_err(files::failed("write", dir))
    }
}

/// A root with its key.
pub(crate) struct Root {
    pub(crate) pem: String,
    until: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Root {
    /// A new one for the key in a file, which is made if need be.
    pub(crate) fn make(
        key: &Path,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, IdentityError> {
        let key = KeyPair::try_from(&read_or_make_key(key, KEY_REMEDY)?)?;
        let until = now + ROOT_LIFE;
        let params = ca_params("isobar root", trust_domain, &key, 1, (now, until))?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, until, issuer: Issuer::new(params, key) })
    }

    /// The one with this certificate and key.
    pub(crate) fn of(
        certificate: &CertificateDer<'static>,
        until: SystemTime,
        key: &PrivateKeyDer<'static>,
    ) -> Result<Self, IdentityError> {
        let issuer = Issuer::from_ca_cert_der(certificate, KeyPair::try_from(key)?)?;
        Ok(Self { pem: pem_of(std::slice::from_ref(certificate)), until, issuer })
    }
}

/// An issuing certificate under `root` for the key in a file, which is made if need be.
pub(crate) fn make_issuer(
    key: &Path,
    root: &Root,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<String, IdentityError> {
    let key = KeyPair::try_from(&read_or_make_key(key, KEY_REMEDY)?)?;
    let until = root.until.min(now + ISSUER_LIFE);
    let mut params: CertificateParams =
        ca_params("isobar issuer", trust_domain, &key, 0, (now, until))?;
    params.use_authority_key_identifier_extension = true;
    Ok(params.signed_by(&key, &root.issuer)?.pem())
}

pub(crate) fn pem_of(certificates: &[CertificateDer<'static>]) -> String {
    let encoded = certificates.iter().map(|der| {
        let body = data_encoding::BASE64.encode(der);
        let lines: Vec<&str> =
            body.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
    });
    encoded.collect()
}
