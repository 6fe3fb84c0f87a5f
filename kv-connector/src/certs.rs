//! Who may speak: a cluster's certificate authority and the identities it issues.
//!
//! Mutual TLS everywhere. A certificate carries two DNS names, and both ends of a connection check them:
//!
//! ```text
//! <role>.role.tandem     what the holder may do     checked by TLS when dialling: "is it a prefill node?"
//! <node>.node.tandem     who the holder is          compared with the node id of the hello
//! ```
//!
//! One process that plays all roles makes an ephemeral authority and never writes it anywhere. A cluster
//! keeps one on disk (`tandem certs`), in a folder of `ca.pem`, `ca.key`, `<node>.pem` and `<node>.key`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::ids::{NodeId, Role};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rcgen::{Certificate, KeyUsagePurpose};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates are valid from a day before they are made, so that hosts whose clocks differ agree.
const BACKDATED: Duration = DAY;
const CA_VALID_FOR: Duration = DAY.saturating_mul(3650);
const NODE_VALID_FOR: Duration = DAY.saturating_mul(730);
/// Owner may read and write, nobody else.
const KEY_FILE_MODE: u32 = 0o600;

const ROLE_SUFFIX: &str = ".role.tandem";
const NODE_SUFFIX: &str = ".node.tandem";

/// Certificates that could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// A file is not there or may not be read.
    #[error("cannot read {path} ({source}): expected {what}, made with `tandem certs`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {path} ({source}): choose a folder that this user may write to")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file is there already; no key is ever overwritten.
    #[error(
        "{path} is there already and is not overwritten: to renew a certificate, remove its .key and .pem first; else choose another name or folder"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file holds something else.
    #[error("{place} does not hold {what} in PEM form ({reason}): make a new one with `tandem certs`")]
    Malformed {
        /// The file, or "the certificate".
        place: String,
        /// What was expected.
        what: &'static str,
        /// The parser's reason.
        reason: String,
    },
    /// A certificate of another cluster, or one that has expired.
    #[error(
        "certificate {certificate} does not pass the authority in {ca} ({reason}): both must come from the same `tandem certs` and be valid today"
    )]
    WrongAuthority {
        /// The node's certificate.
        certificate: String,
        /// The authority's.
        ca: String,
        /// Why not.
        reason: String,
    },
    /// A key of another certificate.
    #[error("key {key} does not belong to certificate {certificate}: copy both files of one node")]
    WrongKey {
        /// The key.
        key: String,
        /// The certificate.
        certificate: String,
    },
    /// A certificate that names no role or node, or several.
    #[error(
        "{place} names {found}: expected one <role>.role.tandem and one <node>.node.tandem, as `tandem certs` writes them"
    )]
    WrongNames {
        /// Which certificate.
        place: String,
        /// Its names.
        found: String,
    },
    /// The certificate library refused.
    #[error("a certificate could not be made: {0}")]
    Generate(#[from] rcgen::Error),
}

/// The authority of one cluster: whoever holds its key decides who belongs.
pub struct ClusterCa {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl ClusterCa {
    /// A new authority with a new key, in memory only.
    ///
    /// # Errors
    /// [`CertError::Generate`].
    pub fn generate() -> Result<Self, CertError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "Tandem cluster CA");
        set_validity(&mut params, CA_VALID_FOR);
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Makes a certificate and its key for one node.
    ///
    /// # Errors
    /// [`CertError::Generate`].
    pub fn issue(&self, role: Role, node: &NodeId) -> Result<Identity, CertError> {
        self.issue_for(role, node, NODE_VALID_FOR)
    }

    /// As [`issue`](Self::issue), valid for `valid_for` from now.
    ///
    /// # Errors
    /// [`CertError::Generate`].
    pub fn issue_for(&self, role: Role, node: &NodeId, valid_for: Duration) -> Result<Identity, CertError> {
        let key = KeyPair::generate()?;
        let names = vec![role_name(role), format!("{node}{NODE_SUFFIX}")];
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, node.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, valid_for);
        let certificate: Certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            role,
            node: node.clone(),
            ca: self.certificate.clone(),
            certificate: certificate.der().clone(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            key: Arc::new(private_key(key.serialize_pem().as_bytes(), "the new key")?),
        })
    }

    /// Writes `ca.pem` and `ca.key` (mode 0600) into `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`CertError::Write`]; [`CertError::Exists`]: an authority that is there already is not overwritten.
    pub fn save(&self, dir: &Path) -> Result<(), CertError> {
        make_dir(dir)?;
        write_new(&dir.join("ca.key"), self.issuer.key().serialize_pem().as_bytes(), KEY_FILE_MODE)?;
        write_new(&dir.join("ca.pem"), self.certificate_pem.as_bytes(), 0o644)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`CertError::Read`], [`CertError::Malformed`], [`CertError::WrongKey`].
    pub fn load(dir: &Path) -> Result<Self, CertError> {
        let (ca_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let certificate_pem = read(&ca_path, "the cluster's certificate")?;
        let key_pem = read(&key_path, "the cluster's key")?;
        let certificate = certificate(certificate_pem.as_bytes(), &shown(&ca_path))?;
        let key = KeyPair::from_pem(&key_pem).map_err(|error| malformed(&shown(&key_path), "a private key", &error))?;
        check_key(&certificate, &shown(&ca_path), &key_pem, &shown(&key_path))?;
        Ok(Self { certificate_pem, issuer: Issuer::from_ca_cert_der(&certificate, key)?, certificate })
    }

    /// The authority's certificate in PEM form.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }
}

/// A node's certificate, its key and the authority it trusts. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    role: Role,
    node: NodeId,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) certificate: CertificateDer<'static>,
    certificate_pem: String,
    key_pem: String,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
}

impl std::fmt::Debug for Identity {
    /// Shows who it is and never the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("role", &self.role).field("node", &self.node).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads an identity from its three files.
    ///
    /// # Errors
    /// [`CertError`] names the file and what was expected of it: not readable, not PEM, names missing,
    /// issued by another authority, key of another certificate.
    pub fn load(ca_pem: &Path, cert_pem: &Path, key_pem: &Path) -> Result<Self, CertError> {
        let ca_text = read(ca_pem, "the cluster's certificate")?;
        let certificate_text = read(cert_pem, "this node's certificate")?;
        let key_text = read(key_pem, "this node's key")?;
        let ca = certificate(ca_text.as_bytes(), &shown(ca_pem))?;
        let own = certificate(certificate_text.as_bytes(), &shown(cert_pem))?;
        let names = CertNames::of(&own, &shown(cert_pem))?;
        check_issued_by(&own, &shown(cert_pem), &ca, &shown(ca_pem))?;
        check_key(&own, &shown(cert_pem), &key_text, &shown(key_pem))?;
        Ok(Self {
            role: names.role,
            node: names.node,
            ca,
            certificate: own,
            certificate_pem: certificate_text,
            key: Arc::new(private_key(key_text.as_bytes(), &shown(key_pem))?),
            key_pem: key_text,
        })
    }

    /// Reads `ca.pem`, `<node>.pem` and `<node>.key` from the folder that `tandem certs` wrote.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_from_dir(dir: &Path, node: &NodeId) -> Result<Self, CertError> {
        Self::load(&dir.join("ca.pem"), &dir.join(format!("{node}.pem")), &dir.join(format!("{node}.key")))
    }

    /// Writes `<node>.pem` and `<node>.key` (mode 0600) into `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`CertError::Write`]; [`CertError::Exists`]: files that are there already are not overwritten.
    pub fn save(&self, dir: &Path) -> Result<(), CertError> {
        make_dir(dir)?;
        write_new(&dir.join(format!("{}.key", self.node)), self.key_pem.as_bytes(), KEY_FILE_MODE)?;
        write_new(&dir.join(format!("{}.pem", self.node)), self.certificate_pem.as_bytes(), 0o644)
    }

    /// The role in the certificate.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The node id in the certificate.
    pub fn node(&self) -> &NodeId {
        &self.node
    }
}

/// The TLS server name that stands for a role.
pub(crate) fn role_name(role: Role) -> String {
    format!("{role}{ROLE_SUFFIX}")
}

/// What a certificate says of its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CertNames {
    pub(crate) role: Role,
    pub(crate) node: NodeId,
}

impl CertNames {
    /// Reads the two names; `place` says in an error which certificate it was.
    pub(crate) fn of(certificate: &CertificateDer<'_>, place: &str) -> Result<Self, CertError> {
        let parsed = parse(certificate, place)?;
        let alternative = parsed.subject_alternative_name().ok().flatten();
        let names: Vec<&str> = alternative
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| if let GeneralName::DNSName(name) = name { Some(*name) } else { None })
            .collect();
        let wrong = || CertError::WrongNames { place: place.to_string(), found: format!("{names:?}") };
        let roles: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(ROLE_SUFFIX)).collect();
        let nodes: Vec<&str> = names.iter().filter_map(|name| name.strip_suffix(NODE_SUFFIX)).collect();
        let ([role], [node]) = (&roles[..], &nodes[..]) else { return Err(wrong()) };
        let all_roles = [Role::Proxy, Role::PrefillNode, Role::DecodeNode];
        let role = all_roles.into_iter().find(|known| known.as_str() == *role).ok_or_else(wrong)?;
        let node = NodeId::new(*node).map_err(|_| wrong())?;
        Ok(Self { role, node })
    }
}

fn set_validity(params: &mut CertificateParams, valid_for: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + valid_for).into();
}

fn parse<'a>(certificate: &'a CertificateDer<'_>, place: &str) -> Result<X509Certificate<'a>, CertError> {
    let parsed = X509Certificate::from_der(certificate.as_ref());
    parsed.map(|(_, certificate)| certificate).map_err(|error| malformed(place, "a certificate", &error))
}

fn certificate(pem: &[u8], place: &str) -> Result<CertificateDer<'static>, CertError> {
    CertificateDer::from_pem_slice(pem).map_err(|error| malformed(place, "a certificate", &error))
}

fn private_key(pem: &[u8], place: &str) -> Result<PrivateKeyDer<'static>, CertError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| malformed(place, "a private key", &error))
}

/// Whether TLS will accept the certificate: signed by this authority and valid today.
fn check_issued_by(
    certificate: &CertificateDer<'static>,
    certificate_place: &str,
    ca: &CertificateDer<'static>,
    ca_place: &str,
) -> Result<(), CertError> {
    let verifier = crate::tls::client_verifier(ca).map_err(|error| malformed(ca_place, "a certificate", &error))?;
    let verified = verifier.verify_client_cert(certificate, &[], UnixTime::now());
    verified.map(|_| ()).map_err(|error| CertError::WrongAuthority {
        certificate: certificate_place.to_string(),
        ca: ca_place.to_string(),
        reason: error.to_string(),
    })
}

fn check_key(
    certificate: &CertificateDer<'_>,
    certificate_place: &str,
    key_pem: &str,
    key_place: &str,
) -> Result<(), CertError> {
    use rcgen::PublicKeyData as _;
    let key = KeyPair::from_pem(key_pem).map_err(|error| malformed(key_place, "a private key", &error))?;
    if parse(certificate, certificate_place)?.public_key().raw == key.subject_public_key_info() {
        return Ok(());
    }
    Err(CertError::WrongKey { key: key_place.to_string(), certificate: certificate_place.to_string() })
}

fn malformed(place: &str, what: &'static str, reason: &dyn std::fmt::Display) -> CertError {
    CertError::Malformed { place: place.to_string(), what, reason: reason.to_string() }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn read(path: &Path, what: &'static str) -> Result<String, CertError> {
    fs::read_to_string(path).map_err(|source| CertError::Read { path: path.to_path_buf(), what, source })
}

fn make_dir(dir: &Path) -> Result<(), CertError> {
    fs::create_dir_all(dir).map_err(|source| CertError::Write { path: dir.to_path_buf(), source })
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CertError> {
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        // Not left to the process's umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => CertError::Exists { path: path.to_path_buf() },
        _ => CertError::Write { path: path.to_path_buf(), source },
    })
}
