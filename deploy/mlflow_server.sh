#!/usr/bin/env bash
# Start the MLflow server of a cluster, on PostgreSQL, for Debian and Ubuntu. It may be run repeatedly.
#   mlflow_server.sh ADDRESS ARTIFACTS [PORT] [BACKUPS]
# ADDRESS is the private address to listen on; PostgreSQL listens on this machine only. The database's password is
# created here, stored in ~/.heterokd/mlflow.env, which only this user can read, and appears on no command line. With
# BACKUPS (a folder or s3://, gs://), deploy/mlflow_backup.py copies the database there each day.
set -euo pipefail
umask 077

address=${1:?the private address to listen on}
artifacts=${2:?the folder of artifacts: s3://, gs:// or a path}
port=${3:-5000}
backups=${4:-}
case $address in
  0.0.0.0 | ::) echo "mlflow_server.sh: $address is every interface; give the private address" >&2; exit 2 ;;
esac
scripts=$(cd "$(dirname "$0")" && pwd)
state=$HOME/.heterokd
mlflow=${MLFLOW:-$HOME/venv/bin/mlflow}
mkdir -p "$state"

if ! command -v pg_ctlcluster > /dev/null; then
  sudo apt-get update -q
  sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q postgresql
fi
read -r version cluster pg_port status _ < <(pg_lsclusters --no-header | head -n 1)
if [ "$status" != online ]; then
  sudo pg_ctlcluster "$version" "$cluster" start
fi

if [ ! -s "$state/mlflow.env" ]; then
  password=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
  {
    echo "MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:$password@127.0.0.1:$pg_port/mlflow"
    echo "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    echo "MLFLOW_DISABLE_TELEMETRY=true"
    echo "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false"
  } > "$state/mlflow.env"
fi
password=$(sed -n 's|^MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:\([0-9a-f]*\)@.*|\1|p' "$state/mlflow.env")
cd /
sudo -u postgres psql --quiet --port "$pg_port" --set ON_ERROR_STOP=1 << SQL
SELECT 'CREATE ROLE mlflow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
ALTER ROLE mlflow PASSWORD '$password';
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
SQL

command=("$mlflow" server --host "$address" --port "$port" --workers 2 --artifacts-destination "$artifacts")
# Browsers connect through an SSH tunnel, as localhost.
command+=(--allowed-hosts "$address:$port,localhost:*,127.0.0.1:*")
# A service that systemd restarts, or else a process in the background: NAME COMMAND...
keep_running() {
  local name=$1
  shift
  if [ -d /run/systemd/system ]; then
    sudo tee "/etc/systemd/system/$name.service" > /dev/null << UNIT
[Unit]
Description=$name of heterokd
After=postgresql.service network-online.target
[Service]
User=$(id -un)
EnvironmentFile=$state/mlflow.env
ExecStart=$*
Restart=always
RestartSec=5
[Install]
WantedBy=multi-user.target
UNIT
    sudo systemctl daemon-reload
    sudo systemctl enable --quiet "$name"
    sudo systemctl restart "$name"
    return
  fi
  if [ -s "$state/$name.pid" ] && kill -0 "$(cat "$state/$name.pid")" 2> /dev/null; then
    kill "$(cat "$state/$name.pid")"
    sleep 2
  fi
  (
    set -a
    . "$state/mlflow.env"
    exec setsid nohup "$@" > "$state/$name.log" 2>&1 < /dev/null
  ) &
  echo $! > "$state/$name.pid"
}

keep_running mlflow "${command[@]}"
if [ -n "$backups" ]; then
  keep_running mlflow-backup "$(dirname "$mlflow")/python" "$scripts/mlflow_backup.py" dump "$backups" --every 24
fi

# Searches on this machine read the server's address here; it contains no password.
environment=$state/environment
touch "$environment"
sed -i '/MLFLOW_TRACKING_URI/d' "$environment"
echo "export MLFLOW_TRACKING_URI=http://$address:$port" >> "$environment"

for _ in $(seq 60); do
  if python3 -c "import urllib.request as r; r.urlopen('http://$address:$port/health', timeout=3)" 2> /dev/null; then
    echo "MLflow answers at http://$address:$port"
    exit 0
  fi
  sleep 2
done
echo "mlflow_server.sh: the server does not answer at http://$address:$port; see 'journalctl -u mlflow' or $state/mlflow.log" >&2
exit 1
