#!/usr/bin/env bash
# Start the MLflow server of a cluster and its database in containers. It may be run repeatedly.
#   mlflow_containers.sh IMAGE ADDRESS WORKSPACE [PORT]
# IMAGE is that of deploy/Dockerfile, ADDRESS the private address to listen on, and WORKSPACE (s3://..., gs://...) holds
# artifacts and backups. PostgreSQL listens on this machine only; its password is created here, stored in ~/.heterokd,
# which only this user can read, and appears on no command line. A new database is filled from the newest backup.
#
# DATABASE_SECRET names a secret of AWS Secrets Manager with the URI of a database elsewhere (RDS):
# postgresql+psycopg2://USER:PASSWORD@HOST:5432/mlflow. Then no PostgreSQL is started and no backup is made here.
set -euo pipefail
umask 077

image=${1:?the image of deploy/Dockerfile}
address=${2:?the private address to listen on}
workspace=${3:?the folder of artifacts and backups: s3:// or gs://}
port=${4:-5000}
case $address in
  0.0.0.0 | ::) echo "mlflow_containers.sh: $address is every interface; give the private address" >&2; exit 2 ;;
esac
state=$HOME/.heterokd
mkdir -p "$state"

write_environment() { # of the server, from the database's URI on standard input
  printf 'MLFLOW_BACKEND_STORE_URI=%s\n' "$(cat)" > "$state/mlflow.env"
  printf '%s\n' MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false >> "$state/mlflow.env"
}
backup() { # arguments of mlflow_backup.py
  docker run "${options[@]}" --network host --env-file "$state/mlflow.env" "$image" python deploy/mlflow_backup.py "$@"
}

if [ -n "${DATABASE_SECRET:-}" ]; then
  aws secretsmanager get-secret-value --secret-id "$DATABASE_SECRET" --query SecretString --output text | write_environment
else
  if [ ! -s "$state/mlflow.env" ]; then
    password=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')
    printf '%s\n' POSTGRES_USER=mlflow POSTGRES_DB=mlflow "POSTGRES_PASSWORD=$password" > "$state/postgres.env"
    printf 'postgresql+psycopg2://mlflow:%s@127.0.0.1:5432/mlflow' "$password" | write_environment
  fi
  if ! docker container inspect heterokd-postgres > /dev/null 2>&1; then
    docker run --detach --name heterokd-postgres --restart unless-stopped --env-file "$state/postgres.env" \
      --volume heterokd-postgres:/var/lib/postgresql/data --publish 127.0.0.1:5432:5432 postgres:17 > /dev/null
  fi
  options=(--rm)
  backup restore "$workspace/backups" --if-empty --wait 120
  options=(--detach --name heterokd-backup --restart unless-stopped)
  docker rm --force heterokd-backup > /dev/null 2>&1 || true
  backup dump "$workspace/backups" --every 24 > /dev/null
fi

docker rm --force heterokd-mlflow > /dev/null 2>&1 || true
# Browsers connect through an SSH tunnel, as localhost.
docker run --detach --name heterokd-mlflow --restart unless-stopped --network host --env-file "$state/mlflow.env" \
  "$image" mlflow server --host "$address" --port "$port" --workers 2 \
  --allowed-hosts "$address:$port,localhost:*,127.0.0.1:*" --artifacts-destination "$workspace/artifacts" > /dev/null

for _ in $(seq "${POLLS:-60}"); do
  if python3 -c "import urllib.request as r; r.urlopen('http://$address:$port/health', timeout=3)" 2> /dev/null; then
    echo "MLflow answers at http://$address:$port"
    exit 0
  fi
  sleep 2
done
echo "mlflow_containers.sh: the server does not answer at http://$address:$port; see 'docker logs heterokd-mlflow'" >&2
exit 1
